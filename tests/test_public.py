"""Folders as hubs and people hold them: what transformers opens, llmkit opens, with equal logits."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import SHARED, needs_shared, sentences
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Rust

from llmkit.errors import ModelError
from llmkit.models import CONFIGS, FAMILIES, build_model
from llmkit.models.folder import load_model, save_model
from llmkit.models.hf_config import read_config, unused_fields
from llmkit.peft.adapter import load_adapter
from llmkit.storage.locate import load_located, locate
from llmkit.tokenizer.answers import render_examples
from llmkit.tokenizer.chat_template import Conversation
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.spell import spell_tokens
from llmkit.tokenizer.train import train_tokenizer

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"max_position_embeddings": 64, "initializer_range": 0.2}
TIED = {  # family -> further fields; all can tie the head to the embedding
    "gpt2": {"n_positions": 64}, "llama": {"num_key_value_heads": 2}, "qwen2": {"num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8}, "falcon": {"ffn_hidden_size": 48},
}  # fmt: skip
IDS = torch.arange(3, 15)[None]


def save_theirs(path: Path, family: str, tied: bool) -> transformers.PreTrainedModel:
    """Save a small model of transformers with random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES | TIED[family], tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(path)
    return model


def change_weights(path: Path, change) -> None:
    weights = change(load_file(path / "model.safetensors"))
    save_file({name: tensor.clone() for name, tensor in weights.items()}, path / "model.safetensors", {"format": "pt"})


def names_of(model: transformers.PreTrainedModel) -> tuple[str, str]:
    """Return (name of the embedding, prefix of all names but the head's)."""
    table = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    return table, f"{model.base_model_prefix}."


VARIANTS = {
    "as_it_is": lambda weights, table, prefix: weights,
    "both_equal": lambda weights, table, prefix: weights | {"lm_head.weight": weights[table]},
    "both_different": lambda weights, table, prefix: weights | {"lm_head.weight": weights[table].flip(0)},
    "head_alone": lambda weights, table, prefix: {
        **{name: tensor for name, tensor in weights.items() if name != table}, "lm_head.weight": weights[table],
    },
    "no_prefix": lambda weights, table, prefix: {name.removeprefix(prefix): t for name, t in weights.items()},
    "a_value_head": lambda weights, table, prefix: weights | {"v_head.summary.weight": torch.ones(1, 32)},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", TIED)
@torch.no_grad()
def test_tied_weights_are_read_as_transformers_reads_them(family, variant, tmp_path, capsys):
    table, prefix = names_of(save_theirs(tmp_path, family, tied=True))
    change_weights(tmp_path, lambda weights: VARIANTS[variant](weights, table, prefix))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = load_model(tmp_path).eval()
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert (ours.lm_head is None) is (variant != "both_different")
    said = {"both_different": "is not tied to", "a_value_head": "v_head.summary.weight"}.get(variant, "")
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("family", TIED)
@torch.no_grad()
def test_untied_weights_without_the_prefix_open_and_without_an_embedding_do_not(family, tmp_path):
    model = save_theirs(tmp_path, family, tied=False)
    table, prefix = names_of(model)
    change_weights(tmp_path, lambda weights: {name.removeprefix(prefix): t for name, t in weights.items()})
    torch.testing.assert_close(load_model(tmp_path).eval()(IDS), model(IDS).logits, rtol=1e-5, atol=1e-5)
    lost = table.removeprefix(prefix)
    change_weights(tmp_path, lambda weights: {name: t for name, t in weights.items() if name != lost})
    with pytest.raises(ModelError, match="1 weights are missing"):
        load_model(tmp_path)


# ---- config.json ----------------------------------------------------------------------------------------------------

# Fields of published files that transformers does not read: Qwen2.5-0.5B, distilgpt2, early conversions of Llama, Phi-3
# style exports, Unsloth, AWQ leftovers that are null.
PUBLISHED = {
    "qwen2": {"use_mrope": False, "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 2},
    "gpt2": {"_num_labels": 1, "n_ctx": 64, "summary_type": "cls_index", "summary_first_dropout": 0.1,
             "id2label": {"0": "LABEL_0"}, "task_specific_params": {"text-generation": {"do_sample": True}}},
    "llama": {"max_sequence_length": 2048, "quantization_config": None, "unsloth_fixed": True, "rope_scaling": None,
              "mup_enabled": False, "multiple_of": 256, "layer_types": None},
    "gemma": {"hidden_activation": None, "head_type": ""},
    "falcon": {"auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"}, "apply_residual_connection": []},
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
@torch.no_grad()
def test_fields_that_transformers_ignores_are_no_reason_to_refuse(family, tmp_path):
    save_theirs(tmp_path, family, tied=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | PUBLISHED[family]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False).eval()
    torch.testing.assert_close(load_model(tmp_path).eval()(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_fields_that_nobody_reads_are_named_in_a_warning(tmp_path, capsys):
    save_theirs(tmp_path, "llama", tied=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_sequence_length": 2048}))
    read_config(tmp_path)
    read_config(tmp_path)
    assert capsys.readouterr().err.count("transformers either: max_sequence_length") == 1
    for field in ("quantization_config", "attn_logit_softcapping", "partial_rotary_factor", "residual_multiplier"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: 0.5}))
        with pytest.raises(ModelError, match=f"llama with {field} is not supported"):
            read_config(tmp_path)
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != field}))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_of_transformers_config_passes_as_one_that_nobody_reads(family):
    theirs = transformers.AutoConfig.for_model(family)
    read = FAMILIES[family].from_hf(theirs.to_dict())
    assert not unused_fields(family, FAMILIES[family].hf_defaults | read)


def test_a_folder_that_was_loaded_untied_is_saved_so(tmp_path):
    table, prefix = names_of(save_theirs(tmp_path, "llama", tied=True))
    change_weights(tmp_path, lambda weights: VARIANTS["both_different"](weights, table, prefix))
    model = load_model(tmp_path)
    save_model(model, tmp_path / "again")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    shutil.rmtree(tmp_path / "again")


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def llama_like() -> Rust:
    """Return a tokenizer with the normalizers of Llama 1 and 2, which put a space before a text."""
    vocab = {"<unk>": 0, "\u2581": 1, **{letter: i for i, letter in enumerate("abcdes|<>_ntory", 2)}}
    rust = Rust(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    rust.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    rust.add_special_tokens([AddedToken("<unk>", normalized=False), AddedToken("<|end_story|>", normalized=True)])
    rust.add_tokens([AddedToken("<think>", normalized=True)])
    return rust


def test_a_normalized_special_token_is_written_back_as_it_was_read(tmp_path):
    llama_like().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_story|>", "unk_token": "<unk>"}))
    one = load_tokenizer(tmp_path)
    assert one.eos == "<|end_story|>" and spell_tokens(one, [one.eos_id]) == [b"<|end_story|>"]
    one.save(tmp_path / "saved")
    again, theirs = load_tokenizer(tmp_path / "saved"), transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    before = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.eos_id == one.eos_id == theirs.eos_token_id and theirs.eos_token == "<|end_story|>"
    for text in ["ab <|end_story|> cd", "<|end_story|>a", "a<think>b <think> c", "<unk> a"]:
        ids = before(text, add_special_tokens=False).input_ids
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert one.encode_with_specials(text, [])[0].tolist() == again.encode_with_specials(text, [])[0].tolist() == ids


@needs_shared
def test_every_tokenizer_at_hand_opens_again_with_the_same_ids(tmp_path):
    found = sorted({path.parent for path in SHARED.parent.rglob("tokenizer.json")})
    texts = [
        "The river  is small.\n\tIt learns",
        "don't <unk> caf\u00e9 \u65e5\u672c",
        "<|im_end|> </s> <s>x",
        "  a b ",
    ]
    assert len(found) >= 5
    for number, folder in enumerate(found):
        one = load_tokenizer(folder)
        one.save(tmp_path / str(number))
        again = load_tokenizer(tmp_path / str(number))
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert again.sha256 == one.sha256 and (again.eos, again.bos) == (one.eos, one.bos)
        for text in texts:
            assert again.encode(text) == one.encode(text)
            ids = theirs(text, add_special_tokens=False).input_ids
            assert one.encode_with_specials(text, [])[0].tolist() == ids
            assert saved(text, add_special_tokens=False).input_ids == ids


def test_the_template_beside_a_config_wins_and_tools_choose_their_own(tmp_path):
    llama_like().save(str(tmp_path / "tokenizer.json"))
    with_tools = "\nTOOLS {{ tools[0].function.name }} {{ messages[0].content }}  \n"
    listed = [{"name": "default", "template": "PLAIN {{ messages[0].content }}\n"}]
    listed += [{"name": "tool_use", "template": with_tools}]
    config = {"eos_token": "<|end_story|>", "chat_template": listed}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    one, messages = load_tokenizer(tmp_path), [{"role": "user", "content": "a"}]
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("")
    assert load_tokenizer(tmp_path).chat_template == one.chat_template
    for tools in (None, [tool]):
        [[found]] = render_examples(one, one.chat_template, [Conversation(messages, [False], tools)])
        assert found.text == theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    (tmp_path / "chat_template.jinja").write_text("FILE {{ messages[0].content }}")
    assert load_tokenizer(tmp_path).chat_template.startswith("FILE")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(messages, tokenize=False) == "FILE a"


def test_a_saved_embedding_of_a_model_that_ties_it_is_refused(tmp_path):
    save_theirs(tmp_path / "base", "llama", tied=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="modules_to_save has a matrix that the model ties"):
        load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")


def test_a_t5_with_two_matrices_that_should_be_tied_is_refused(tmp_path):
    config = transformers.T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights | {"lm_head.weight": weights["shared.weight"].flip(0)})
    with pytest.raises(ModelError, match="differ, and its config"):
        load_model(tmp_path)


def test_an_adapter_without_a_tokenizer_has_its_bases(tmp_path):
    tokenizer = train_tokenizer([sentences(0, 40)], vocab_size=300)
    base = build_model(CONFIGS["llama"](**SIZES | {"vocab_size": len(tokenizer), "num_key_value_heads": 2}))
    save_model(base, tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter")
    model, found = load_located(locate(tmp_path / "adapter"))
    assert found.sha256 == tokenizer.sha256
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS), theirs.eval()(IDS).logits, rtol=1e-5, atol=1e-5)
