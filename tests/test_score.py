"""What a model finds likely: the numbers equal the plain forward pass, and the page shows them."""

import json
import math
import re
import shutil
from html import unescape

import pytest
import torch
from conftest import llmkit

from llmkit.errors import UserError
from llmkit.evals.page import make_page
from llmkit.evals.probabilities import attribute, check_same_tokens, score_text
from llmkit.inference.logprobs import token_texts
from llmkit.models import CONFIGS, build_model
from llmkit.models.folder import save_model
from llmkit.tokenizer.train import train_tokenizer

TEXT = "The quick <b>fox</b> & the größe 北京 {{text}}."
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 5, vocab_size=290)


def make(tokenizer, family="llama", seed=0, **options):
    config = CONFIGS[family](vocab_size=len(tokenizer), **SHAPE | {"max_position_embeddings": 96} | options)
    model = build_model(config, seed=seed)
    for p in model.parameters():
        p.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(p.numel() + seed))
    return model.eval()


@pytest.mark.parametrize("positions", [96, 16])
def test_surprise_and_rank_are_those_of_the_forward_pass(tokenizer, positions):
    model = make(tokenizer, max_position_embeddings=positions)
    ids = tokenizer.encode(TEXT)
    found = score_text(model, tokenizer, TEXT, top=3)
    assert [one.id for one in found.tokens] == ids and found.log_prob == -sum(one.surprise for one in found.tokens)
    whole = [tokenizer.eos_id, *ids]
    for i, one in enumerate(found.tokens[:positions]):  # the first window
        with torch.no_grad():
            log_probs = model(torch.tensor([whole[: i + 1]]))[0, -1].log_softmax(-1)
        assert one.surprise == pytest.approx(-log_probs[one.id].item(), abs=1e-4)
        assert one.rank == int((log_probs > log_probs[one.id]).sum()) + 1
        assert [p for _, p in one.alternatives] == pytest.approx(log_probs.exp().topk(3).values.tolist(), abs=1e-5)


def test_tokens_show_the_text(tokenizer):
    texts = token_texts(tokenizer, tokenizer.encode(TEXT))
    assert "".join(text for text in texts if text != "\ufffd") == TEXT


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mistral"])
def test_attribution_is_the_gradient_times_the_input(tokenizer, family):
    model = make(tokenizer, family)
    token, speaks, layers = attribute(model, tokenizer, TEXT)
    ids = tokenizer.encode_prompt(TEXT)
    embedded = model.wte(torch.tensor([ids])).detach()
    step, i = 1e-3, 3
    logits = []
    for scale in (1 - step, 1 + step):  # scale one token's embedding: the slope is the gradient times the input
        changed = embedded.clone()
        changed[0, i] *= scale
        hook = model.wte.register_forward_hook(lambda *_, value=changed: value)
        with torch.no_grad():
            logits.append(model(torch.tensor([ids]))[0, -1])
        hook.remove()
    best = int(model(torch.tensor([ids]))[0, -1].argmax())
    assert tokenizer.decode([best]) == token and len(speaks) == len(tokenizer.encode(TEXT))
    slope = (logits[1][best] - logits[0][best]).item() / (2 * step)
    assert speaks[i - (len(ids) - len(speaks))] == pytest.approx(slope, rel=0.05, abs=1e-3)
    assert len(layers) == 2
    for heads in layers:
        assert heads.shape == (4, len(speaks), len(speaks))
        assert torch.allclose(heads.sum(-1), torch.ones(4, len(speaks)), atol=1e-4)
        assert not heads.triu(1).any()


def test_the_page_shows_each_token_and_breaks_nothing(tokenizer):
    ours, theirs = (score_text(make(tokenizer, seed=seed), tokenizer, TEXT) for seed in (0, 1))
    page = make_page("a<b>", ours, ("other", theirs), None)
    shown = re.findall(r'data-tip="([^"]*)">([^<]*)</span>', page)
    assert len(shown) == len(ours.tokens) and "<b>fox" not in page
    for (tip, text), one in zip(shown, ours.tokens, strict=True):
        assert unescape(text) == one.text and f"rank {one.rank}" in unescape(tip)
    assert 'src="http' not in page and "href=" not in page


def test_models_with_other_tokens_are_not_compared(tokenizer):
    with pytest.raises(UserError, match="other tokenizers"):
        check_same_tokens(tokenizer, train_tokenizer(["abc"] * 5, vocab_size=280))


def test_the_command(tokenizer, tmp_path):
    for seed, name in enumerate(("a", "b")):
        save_model(make(tokenizer, seed=seed), tmp_path / name)
        tokenizer.save(tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    printed = llmkit("score", "a", "text.txt", "--beside", "b", "--html", "p.html", "--attribute", cwd=tmp_path)
    assert "nats" in printed.stdout and (tmp_path / "p.html").is_file()
    assert "exists already" in llmkit("score", "a", TEXT, "--html", "p.html", cwd=tmp_path, code=2).stderr
    found = json.loads(llmkit("score", "a", TEXT, "--json", cwd=tmp_path).stdout)
    expected = score_text(make(tokenizer), tokenizer, TEXT)
    assert math.isclose(found["log_prob"], expected.log_prob, rel_tol=1e-5) and len(found["tokens"]) == len(
        expected.tokens
    )
    assert "--html" in llmkit("score", "a", TEXT, "--attribute", cwd=tmp_path, code=2).stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium") or not shutil.which("chromedriver"), reason="no Chromium")
@pytest.mark.parametrize("width", [380, 1200])
def test_a_browser_shows_the_page_narrow_and_wide(tokenizer, tmp_path, width):
    from selenium import webdriver

    model = make(tokenizer)
    page = make_page("model", score_text(model, tokenizer, TEXT), None, attribute(model, tokenizer, TEXT))
    (tmp_path / "p.html").write_text(page, encoding="utf-8")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.set_window_size(width, 800)
        driver.get((tmp_path / "p.html").as_uri())
        token = driver.find_elements("css selector", ".t")[7]
        webdriver.ActionChains(driver).move_to_element(token).perform()
        assert driver.find_element("id", "tip").text.startswith(token.get_attribute("data-tip").splitlines()[0])
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert not driver.get_log("browser")
    finally:
        driver.quit()
