"""Load a tokenizer from a file, a folder or the hub, with what the config files beside it say."""

import math
from pathlib import Path

from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Rust

from llmkit.errors import ModelError, UserError
from llmkit.files import read_json
from llmkit.tokenizer.fast import PATTERNS
from llmkit.tokenizer.foreign import (
    SPACE,
    TOKEN_FLAGS,
    find_tokenizer_file,
    prevent_special_token_injection,
    read_foreign_tokenizer,
)
from llmkit.tokenizer.guard import library_errors
from llmkit.tokenizer.tokenizer import BOS_NAMES, CONFIG, EOS_NAMES, ROLES, Tokenizer

DEFAULT_CLASSES = {"bert": "BertTokenizer", "gpt2": "GPT2Tokenizer"}  # of models whose folder names none
OTHER_CLASSES = {"mistral", "mixtral", "qwen2"}  # models for which transformers does not take the class of a config
MODEL_CONFIGS = ("config.json", "generation_config.json")  # of a model's folder


def fetch_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer from a path as `load_tokenizer` does, or download it by its id on the hub."""
    if Path(name).exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        return load_tokenizer(Path(name).expanduser())
    what, fix = "this is neither a file nor a tokenizer on the hub", "name a tokenizer.json"
    try:
        with library_errors(what, at=name, fix=fix):
            rust = prevent_special_token_injection(Rust.from_pretrained(name))
    except ValueError as error:  # the name can be no id of the hub
        raise ModelError(f"{what}: {error}", at=repr(name), fix=fix) from None
    eos_id = next((i for name in EOS_NAMES if (i := rust.token_to_id(name)) is not None), 0)
    return Tokenizer(rust, eos_id)


def read_tokenizer_configs(path: Path) -> dict:
    """Return the merged contents of the config files in a tokenizer's folder."""
    configs: dict = {}
    for name in ("special_tokens_map.json", *MODEL_CONFIGS, CONFIG):  # later files win
        configs |= read_config_file(path.with_name(name))
    return configs


def read_config_file(file: Path) -> dict:
    """Return the fields of a JSON file; none if there is no such file."""
    if not file.is_file():
        return {}
    try:
        config = read_json(file)
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, OSError) as error:
        raise ModelError(f"{file.name} can't be read: {error}", at=file) from None
    return config


def read_template(path: Path) -> str:
    """Read a Jinja file. Raise ModelError if it can't be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ModelError(f"the chat template can't be read: {error}", at=path) from None
    if not text.strip():
        raise ModelError("the chat template is empty", at=path)
    return text


def find_template(path: Path, configs: dict) -> str | None:
    """Return the chat template of a tokenizer: chat_template.jinja, else that of its config; None if there is neither.

    Of a list of named templates transformers takes the one named tool_use if there are tools, and the one named default
    otherwise: they become one template.
    """
    template, file = configs.get("chat_template"), path.with_name("chat_template.jinja")
    if file.is_file():
        template = read_template(file)
    if template is None:
        return None
    if isinstance(template, list):
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
    if (for_tools := path.with_name("additional_chat_templates") / "tool_use.jinja").is_file():
        named = template if isinstance(template, dict) else {"default": template}
        template = named | {"tool_use": read_template(for_tools)}
    if isinstance(template, dict):
        named = template
        template = named.get("default")
        if isinstance(template, str) and isinstance(with_tools := named.get("tool_use"), str):
            parts = [one.removesuffix("\n") for one in (with_tools, template)]  # jinja2 drops it at the end of a file
            template = "{{% if tools +%}}{}{{%+ else +%}}{}{{%+ endif %}}".format(*parts)
    if not isinstance(template, str):
        expected = "a text, or a list of {name, template} with one named default"
        raise ModelError("the chat template can't be read", at=path.with_name(CONFIG), expected=expected)
    return template


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer that `load_tokenizer` reads."""
    return (folder / "tokenizer.json").is_file() or find_tokenizer_file(folder) is not None


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json, a SentencePiece .model or a vocab.json with merges.txt, or a folder that holds one.

    A checkpoint and a run hold one too: all checkpoints of a run have the same.

    The end token and the chat template come from the config files in its folder.
    """
    if path.is_dir():
        folders = [path, *(one for glob in ("model", "checkpoints/*/model") for one in sorted(path.glob(glob)))]
        found = ([folder / "tokenizer.json", find_tokenizer_file(folder)] for folder in folders)
        path = next((file for files in found for file in files if file and file.is_file()), path)
    if not path.is_file():
        raise ModelError("there is no tokenizer", at=path, fix="name a tokenizer.json, or a folder that holds one")
    configs = read_tokenizer_configs(path)
    try:
        with library_errors("the tokenizer can't be read", at=path):
            is_json = path.suffix == ".json" and path.name not in ("vocab.json", "encoder.json")
            rust = Rust.from_file(str(path)) if is_json else read_foreign_tokenizer(path, configs, PATTERNS["qwen2"])
            rust.no_truncation()  # some files were saved with settings that would truncate or pad every text
            rust.no_padding()
            if is_json:
                rust = apply_overrides(rust, configs)
                add_tokens_beside(rust, path, configs)
                rust = prevent_special_token_injection(rust)
    except UserError:
        raise
    except Exception as error:  # files with values of other types
        raise ModelError(f"the tokenizer can't be read: {error}", at=path) from None
    tokens = named_tokens(configs)
    vocab = rust.get_vocab(with_added_tokens=True)
    named = read_config_file(path.with_name(CONFIG)).get("eos_token")  # old files beside it may be stale
    if named and (eos := tokens.get("eos_token")) and eos not in vocab:
        what, fix = "the vocabulary does not have the eos_token of the config", "name one of its tokens there"
        raise ModelError(what, at=path.with_name(CONFIG), got=eos, fix=fix)
    role_tokens = {role: token for role, token in tokens.items() if token in vocab}
    candidates = [rust.token_to_id(name) for name in (role_tokens.pop("eos_token", None), *EOS_NAMES) if name]
    eos_id = next((i for i in candidates if i is not None), None)
    if eos_id is None:
        fix = "name it as eos_token in tokenizer_config.json in the same folder"
        raise ModelError("the tokenizer has no end-of-text token", at=path, expected=" or ".join(EOS_NAMES), fix=fix)
    template = find_template(path, configs)
    bos_names = BOS_NAMES if ".model" in path.name else ()  # SentencePiece files may come without a config
    default_bos = next((name for name in bos_names if rust.token_to_id(name) is not None), None)
    bos = role_tokens.pop("bos_token", default_bos)
    tokenizer = Tokenizer(rust, eos_id, bos, template, role_tokens=role_tokens)
    set_extra_stop_ids(tokenizer, path.parent)
    return tokenizer


def named_tokens(configs: dict) -> dict[str, str]:
    """Return {role: token} of the special tokens that the configs name."""
    tokens = {role: configs.get(role) for role in ("eos_token", "bos_token", *ROLES)}
    tokens = {role: token.get("content") if isinstance(token, dict) else token for role, token in tokens.items()}
    return {role: token for role, token in tokens.items() if isinstance(token, str)}


def add_tokens_beside(rust: Rust, path: Path, configs: dict) -> None:
    """Add the tokens that the files beside a tokenizer.json list, and make those special that they call special.

    As in transformers, the ids of tokenizer.json are right, and those in the files are not read: a new token gets the
    next one. Only tokens for which the model has an embedding are added.
    """
    decoder = configs.get("added_tokens_decoder") or {}
    listed = [decoder[i] for i in sorted(decoder, key=int)]
    file = path.with_name("added_tokens.json")
    names = sorted(read_json(file).items(), key=lambda one: one[1]) if file.is_file() else []
    listed += [{"content": name, "normalized": False} for name, _ in names]
    there = {token.content: token.special for token in rust.get_added_tokens_decoder().values()}
    most = configs.get("vocab_size") or math.inf
    for token in listed:
        name, special = token["content"], token.get("special", False)
        is_new = rust.token_to_id(name) is None
        if there.get(name) or not (is_new or special) or (is_new and rust.get_vocab_size() >= most):
            continue  # a folder may list hundreds, and nearly all are there: each that is added costs milliseconds
        added = AddedToken(name, **{key: token[key] for key in TOKEN_FLAGS if key in token})
        (rust.add_special_tokens if special else rust.add_tokens)([added])
        there[name] = special
    more = configs.get("additional_special_tokens") or configs.get("extra_special_tokens") or []
    more = list(more.values()) if isinstance(more, dict) else more
    names = [*named_tokens(configs).values(), *(one.get("content") if isinstance(one, dict) else one for one in more)]
    names = [name for name in dict.fromkeys(names) if isinstance(name, str) and name not in there]
    rust.add_special_tokens([name for name in names if rust.token_to_id(name) is not None])


def apply_overrides(rust: Rust, configs: dict) -> Rust:
    """Return a tokenizer.json's tokenizer with what its config says differently, as the classes of transformers 5 do.

    BERT's and GPT-2's set their options even where the config does not name them: BERT's are in lower case without
    do_lower_case: false. Llama's has Metaspace in place of the normalizer in the file. Many folders name a class that
    is not theirs, such as GPT-2's for Llama models, so only the parts that a class has itself are changed.
    """
    model, prefix = configs.get("model_type"), configs.get("add_prefix_space")
    kind = str(configs.get("tokenizer_class") or DEFAULT_CLASSES.get(str(model))).removesuffix("Fast")
    if model in OTHER_CLASSES:
        return rust
    if kind == "BertTokenizer" and isinstance(rust.normalizer, normalizers.BertNormalizer):
        rust.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=configs.get("tokenize_chinese_chars", True),
            strip_accents=configs.get("strip_accents"),
            lowercase=configs.get("do_lower_case", True),
        )
    elif kind == "GPT2Tokenizer" and isinstance(rust.pre_tokenizer, pre_tokenizers.ByteLevel):
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix))
    elif kind == "LlamaTokenizer" and model in (None, "llama") and getattr(rust.model, "byte_fallback", False):
        where = "never" if prefix is False else "always" if configs.get("legacy") else "first"
        strip = [] if prefix is False else [decoders.Strip(" ", left=1, right=0)]
        rust.normalizer = None
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=where, split=False)
        rust.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    return rust


def set_extra_stop_ids(tokenizer: Tokenizer, folder: Path) -> None:
    """Set `extra_stop_ids` from the eos_token_id of a model's config files, an id or a list of ids in each."""
    found = [read_config_file(folder / name).get("eos_token_id") for name in MODEL_CONFIGS]
    ids = [i for value in found for i in (value if isinstance(value, list) else [value])]
    tokenizer.extra_stop_ids = list(dict.fromkeys(i for i in ids if type(i) is int and 0 <= i < len(tokenizer)))
