"""Personal data is found by shape and check, replaced by what nobody owns, and counted."""

import json
import random
import time
from typing import get_args

import pytest
import yaml
from conftest import sentences, tiny_config

from llmkit.config.data import CorpusData, Pii
from llmkit.config.load import load_config
from llmkit.corpus.build import build_corpus
from llmkit.corpus.pii import PII_KINDS, find_pii, scrub
from llmkit.errors import UserError

pytest.importorskip("re2")

PLANTED = [
    ("email", "jo.smith+x@corp.co.uk"), ("ip", "8.8.8.8"), ("ip", "2001:4860:4860::8888"),
    ("card", "4111 1111 1111 1111"), ("card", "5500-0000-0000-0004"), ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "GB82WEST12345698765432"), ("ssn", "123-45-6789"), ("phone", "+49 30 901820"), ("phone", "212-736-5000"),
    ("phone", "(212) 736-5000"), ("secret", "AKIAIOSFODNN7EXAMPLE"), ("secret", "ghp_" + "a1B2" * 9),
    ("phone", "030/901820"), ("phone", "0171 2345678"), ("phone", "(030) 901820"), ("phone", "020 7946 0958"),
    ("phone", "01 23 45 67 89"), ("email", "info@b\u00fccher-m\u00fcller.de"),
    ("secret", "-----BEGIN RSA PRIVATE KEY-----\nMIIE+/=\n-----END RSA PRIVATE KEY-----"),
]  # fmt: skip
INNOCENT = [
    "icon@2x.png", "me@example.com", "10.0.0.1", "192.0.2.7", "127.0.0.1", "999.8.8.8", "1.2.3", "12:34:56",
    "4111 1111 1111 1112", "1234567890123456", "0000 0000 0000 0000", "DE89 3704 0044 0532 0130 01", "000-12-3456",
    "666-12-3456", "2024-11-21", "202-555-0100", "x212-736-5000", "3.14159265358979", "std::vector::size",
    "version 2.0.1.3", "v8.1.2.4", "nginx/1.18.0.44", "lib==2.3.4.5", "git@github.com:org/repo.git", "01/02/2003",
    "+12.5 103.2 11.7", "6-4 6-3 7-6", "0-306-40615-2", "0800 123", "password=None", "password = getpass()",
    "password: required", "password=args.password", 'password="{secret}"', "api_key=$KEY1", "0.1.2.3-rc1",
    "0x1234567890abcdef", "AKIAshort", "a@b", "@decorator.name",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), PLANTED)
def test_what_is_personal_is_found_alone_and_amid_text(kind, value):
    for text in (value, f"Grüße: {value}.", f"({value}, and so on)", f"a\n{value}\nb"):
        raw = text.encode()
        assert [(k, raw[a:b].decode()) for a, b, k in find_pii(raw, PII_KINDS)] == [(kind, value)], text


@pytest.mark.parametrize(("text", "clean"), [
    ("password=hunter2.", "password=SECRET."), ('password = "correct-horse"', 'password = "SECRET"'),
    ("DB_PASSWORD=hunter2x", "DB_PASSWORD=SECRET"), ('{"password": "hunter2x"}', '{"password": "SECRET"}'),
    ("api_key: 9f8a7b6c5d", "api_key: SECRET"), ("git@gmail.com", "email@example.com"),
])  # fmt: skip
def test_the_value_of_a_password_is_replaced_and_its_name_stays(text, clean):
    assert scrub(text, PII_KINDS, "replace")[0] == clean
    assert scrub(clean, PII_KINDS, "replace")[0] == clean


@pytest.mark.parametrize("value", INNOCENT)
def test_what_only_looks_so_is_left_alone(value):
    assert scrub(f"see {value} there", PII_KINDS, "replace") == (f"see {value} there", {})


@pytest.mark.parametrize("action", ["replace", "tag"])
def test_a_text_is_clean_after_one_pass_and_the_rest_is_untouched(action):
    draw = random.Random(0)
    planted = draw.choices(PLANTED, k=60)
    around = [f" wörd{i}\u3000and, so; on " for i in range(61)]
    text = around[0] + "".join(value + words for (_, value), words in zip(planted, around[1:], strict=True))
    cleaned, counts = scrub(text, PII_KINDS, action)
    assert counts.total() == 60 and all(counts[kind] == sum(k == kind for k, _ in planted) for kind in PII_KINDS)
    assert all(words in cleaned for words in around) and not any(value in cleaned for _, value in PLANTED)
    assert scrub(cleaned, PII_KINDS, action) == (cleaned, {})


@pytest.mark.parametrize("before", ["12 ", "AB12 ", "7-", "1.2 34 "])
def test_a_false_start_hides_nothing_behind_it(before):
    assert scrub(f"{before}4111 1111 1111 1111", PII_KINDS, "tag")[0] == f"{before}<CARD>"


def test_only_the_kinds_that_are_asked_for():
    assert scrub("jo@corp.org 8.8.8.8", ("ip",), "tag") == ("jo@corp.org <IP>", {"ip": 1})


@pytest.mark.parametrize(
    "unit",
    [
        "-----BEGIN PRIVATE KEY----- 8.8.8.8 ",
        "1 ",
        "a@",
        "1.",
        "(212) ",
        "-----BEGIN RSA PRIVATE KEY-----",
        "ab12 ",
        ":1",
        "+1 ",
    ],
)
def test_hostile_text_takes_linear_time(unit):
    def seconds(size: int) -> float:
        text, start = unit * (size // len(unit)), time.process_time()
        scrub(text, PII_KINDS, "tag")
        return time.process_time() - start

    assert seconds(400_000) < 8 * max(seconds(100_000), 0.05)


def test_the_config_knows_every_kind():
    (kinds,) = get_args(Pii.model_fields["kinds"].annotation)
    assert set(get_args(kinds)) == set(PII_KINDS)


@pytest.mark.parametrize("section", [{"action": "tag"}, {"kinds": ["ip"], "action": "drop", "drop_above": 3}])
def test_options_that_would_do_nothing_are_errors(tmp_path, section):
    values = tiny_config(tmp_path)
    values["data"]["pii"] = section
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"data\.pii.*(no kinds|no effect)"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("action", ["replace", "tag", "drop"])
def test_a_build_scrubs_counts_and_shows_nobodys_data(tmp_path, action):
    (tmp_path / "text").mkdir()
    for i in range(12):
        personal = (
            "mail jo@corp.org now" if i == 3 else "\n".join(f"p{n}@corp.org" for n in range(80)) if i == 5 else ""
        )
        (tmp_path / "text" / f"{i}.txt").write_text(sentences(i, 40) + personal)
    values = tiny_config(tmp_path)["data"] | {"pii": {"kinds": ["email"], "action": action}}
    manifest = build_corpus(CorpusData(**values), say=lambda line: None)
    row = manifest["funnel"]["text"]
    assert row["pii"] == {"email": 81} and row["dropped"] == {"pii": 2 if action == "drop" else 1}
    report = (tmp_path / "data/report.md").read_text()
    assert "personal data found: 81 email" in report and "corp.org" not in report
    assert "corp.org" not in json.dumps(json.loads((tmp_path / "data/report.json").read_text()))
