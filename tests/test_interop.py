"""Files for and from other programs: GGUF as llama.cpp runs it, checkpoints of llama2.c, and what is refused."""

import io
import json
import re
import resource
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import llmkit, sentences
from safetensors.torch import load_file

from llmkit.commands import app as cli
from llmkit.errors import ENVIRONMENT, MODEL, UserError
from llmkit.formats.gguf import fill_from_gguf, write_gguf
from llmkit.formats.llama2c import import_llama2c
from llmkit.generation.generate import decode_until_stop, stream
from llmkit.generation.sampling import Sampling
from llmkit.models import CONFIGS, build_model, folder
from llmkit.tokenizer.foreign import from_llama2c
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.tokenizer import CHAT_END, CHAT_START, EOS, Tokenizer
from llmkit.tokenizer.train import train_tokenizer

TEXT = (
    sentences(1, 200)
    + "Over 1234567 & 89? Don't they're \u00e4\u00f6\u00fc \u65e5\u672c\u8a9e <s> </s> <|im_end|>\n" * 3
)
PROMPT = "The model reads a "
TEXTS = [
    "a", " a", "a ", "  a  b", "\n", "\n\n a\n", "The river  is small.\n\tIt learns", "don't WE'LL they're", "x" * 100,
    "1234567 1,5 \u0661\u0662", "caf\u00e9 \u65e5\u672c\u8a9e\u306f", "\U0001f600\U0001f468\u200d\U0001f469 \u2764",
    "\xa0a\u3000b", "<|endoftext|>a<|im_start|>", "<s>a</s> <0x41>", "!?" * 20, "\u0939\u093f\u0928", TEXT[:500],
]  # fmt: skip


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer([TEXT], vocab_size=300)


# ---- the command line, in this process -------------------------------------------------------------------------------


def failed(capsys, *arguments: object, code: int = MODEL) -> str:
    """Return the error of a command that fails, which must be one block without a traceback."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert ended.value.code == code, said.err
    assert said.err.startswith("error: ") and said.err.count("error: ") == 1 and not said.out
    return said.err


def run_here(capsys, *arguments: object) -> dict:
    """Return the JSON that a command prints."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments), "--json"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    return json.loads(said.out)


# ---- models ---------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 304, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 96}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 96}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
FAMILIES = {
    "gpt2": ("gpt2", {}),
    "gpt2_untied": ("gpt2", {"tie_word_embeddings": False, "intermediate_size": 96}),
    "llama": ("llama", GROUPED),
    "llama_biases": ("llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("llama", GROUPED | {"tie_word_embeddings": True, "rope_theta": 5e5, "rms_norm_eps": 1e-3}),
    "llama_wide_heads": ("llama", GROUPED | {"head_dim": 32}),
    "linear": ("llama", GROUPED | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama3": ("llama", GROUPED | {"rope_scaling": LLAMA3}),
    "yarn": ("llama", GROUPED | {"rope_scaling": YARN}),
    "mistral": ("mistral", GROUPED | {"sliding_window": None}),
    "mistral_window": ("mistral", GROUPED | {"sliding_window": 80}),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2_yarn": ("qwen2", GROUPED | {"tie_word_embeddings": True, "rope_scaling": YARN}),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 32}),
    "gemma": ("gemma", {"num_key_value_heads": 1, "intermediate_size": 96, "head_dim": 32}),
    "falcon": ("falcon", {}),
    "falcon_untied": ("falcon", {"tie_word_embeddings": False}),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def randomized(name: str, seed: int = 0, families: dict = FAMILIES) -> torch.nn.Module:
    """Set weights for which every part of a model matters, and texts do not repeat one word."""
    family, options = families[name]
    model = build_model(CONFIGS[family](**SIZES | options), seed=0).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            norm = p.dim() == 1 and key.endswith("weight")
            spread = 1.5 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.3 if norm else 0.05
            p.normal_(float(norm), spread * (2 if re.search("embed|wte", key) else 1), generator=generator)
    return model


def ours_of(model: torch.nn.Module, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """Return 50 greedy tokens, and the logits of all tokens that were read and written."""
    written = list(stream(model, ids, max_new_tokens=50, sampling=Sampling(temperature=0)))
    with torch.no_grad():
        return written, model(torch.tensor([ids + written]))[0]


@pytest.fixture(scope="module")
def saved(bpe, tmp_path_factory) -> Path:
    """Return the folder of a saved model."""
    path = tmp_path_factory.mktemp("saved")
    folder.save_model(randomized("llama"), path, eos_token_ids=[bpe.eos_id])
    bpe.save(path)
    return path


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path, **options):
        llama_cpp = pytest.importorskip("llama_cpp")
        threads = {"n_threads": 1, "n_threads_batch": 1}
        cache = {"type_k": 0, "type_v": 0}  # in fp32
        options = {"n_ctx": 96, "logits_all": True} | options
        self.model = llama_cpp.Llama(str(path), verbose=False, **options, **cache, **threads)

    def encode(self, text: str) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=True, special=False)

    def logits(self, ids: list[int]) -> torch.Tensor:
        self.model.reset()
        self.model.eval(ids)
        return torch.tensor(np.array(self.model.scores[: len(ids)]))

    def write(self, ids: list[int], number: int) -> list[int]:
        self.model.reset()
        return [token for token, _ in zip(self.model.generate(ids, temp=0.0, top_k=1), range(number), strict=False)]


def clear(name: str, ids: list[int]) -> tuple[torch.nn.Module, list[int], torch.Tensor]:
    """Return a model, the 50 tokens that it writes greedily by clear margins, and their logits."""
    for seed in range(30):
        model = randomized(name, seed)
        written, logits = ours_of(model, ids)
        first, second = logits[len(ids) - 1 : -1].topk(2).values.T
        if (first - second).min() > 0.02 and len(set(written)) > 8:
            return model, written, logits
    raise AssertionError("no seed gives clear margins")


@every_family
def test_llama_cpp_writes_what_we_write(name, bpe, tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    ids = bpe.encode_prompt(PROMPT)
    model, written, logits = clear(name, ids)
    write_gguf(model, bpe, tmp_path / "m.gguf", "fp32")
    theirs = LlamaCpp(tmp_path / "m.gguf")
    assert theirs.encode(PROMPT) == ids
    assert theirs.write(ids, 50) == written
    torch.testing.assert_close(theirs.logits(ids + written), logits, rtol=1e-3, atol=rounding(model, logits))


def rounding(model: torch.nn.Module, logits: torch.Tensor) -> float:
    """Return the tolerance in fp32: llama.cpp looks GELU up in a table of fp16."""
    return float(logits.std()) * (1e-2 if "gelu" in getattr(model.config, "hidden_act", "gelu") else 1e-3)


TOLERANCES = {"fp16": 0.01, "bf16": 0.08, "q8_0": 0.2}  # of the logits' spread, on the average


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3", "gemma", "falcon"])  # a router's choice flips
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rounded_weights_stay_close(name, dtype, bpe, tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    model, ids = randomized(name), bpe.encode_prompt(PROMPT)
    written, logits = ours_of(model, ids)
    write_gguf(model, bpe, tmp_path / "m.gguf", dtype)
    off = (LlamaCpp(tmp_path / "m.gguf").logits(ids + written) - logits).square().mean().sqrt() / logits.std()
    assert 1e-5 < off < TOLERANCES[dtype]


ODD = {
    "qwen3_biases": ("qwen3", GROUPED | {"head_dim": 32, "attention_bias": True}),
    "qwen3_llama3": ("qwen3", GROUPED | {"head_dim": 32, "rope_scaling": LLAMA3}),
    "gemma_untied": ("gemma", GROUPED | {"head_dim": 32, "tie_word_embeddings": False}),
    "gemma_biases": ("gemma", GROUPED | {"head_dim": 32, "attention_bias": True}),
    "falcon_biases": ("falcon", {"bias": True}),
    "falcon_llama3": ("falcon", {"rope_scaling": LLAMA3}),
}


@pytest.mark.parametrize("name", ODD)
def test_what_llama_cpp_does_not_load_is_refused(name, bpe, tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    model, ids = randomized(name, families=ODD), bpe.encode_prompt(PROMPT)
    try:
        write_gguf(model, bpe, tmp_path / "m.gguf", "fp32")
    except UserError as error:
        assert error.code == MODEL and not list(tmp_path.iterdir())
        return
    written, logits = ours_of(model, ids)
    theirs = LlamaCpp(tmp_path / "m.gguf").logits(ids + written)
    torch.testing.assert_close(theirs, logits, rtol=1e-3, atol=rounding(model, logits))


# ---- tokenizers in llama.cpp ----------------------------------------------------------------------------------------


def same_ids(tokenizer: Tokenizer, path: Path, texts: list[str]) -> None:
    """Assert that llama.cpp encodes the texts as we do."""
    options = GROUPED | {"vocab_size": len(tokenizer) + 5, "num_hidden_layers": 1}
    write_gguf(build_model(CONFIGS["llama"](**SIZES | options)), tokenizer, path, "fp32")
    theirs = LlamaCpp(path, vocab_only=True, logits_all=False)
    for text in texts:
        assert theirs.encode(text) == tokenizer.prefix + tokenizer.encode(text), text


@pytest.mark.parametrize("pattern", ["gpt2", "llama3", "qwen2"])
def test_byte_level_tokenizers_give_the_same_ids(pattern, tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    one = train_tokenizer([TEXT], vocab_size=500, pattern=pattern, special_tokens=["<tool>"])
    same_ids(one, tmp_path / "m.gguf", [*TEXTS, "a<tool>b"])


def sentencepiece_bpe(**options) -> bytes:
    """Train a tokenizer like Llama 2's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    file, lines = io.BytesIO(), [*TEXT.splitlines(), "< / > & ? ; 0123456789"]
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    basic = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 450, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, **basic | plain | {"character_coverage": 1.0} | options
    )
    return file.getvalue()


PIECES = {
    "llama": {"split_digits": True, "allow_whitespace_only_pieces": True}, "bare": {"add_dummy_prefix": False},
    "control": {"control_symbols": ["<ctl>"]},
}  # fmt: skip


@pytest.mark.parametrize("options", PIECES.values(), ids=PIECES)
def test_sentencepiece_tokenizers_give_the_same_ids(options, tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bpe(**options))
    one = load_tokenizer(tmp_path)
    assert one.prefix == [1]
    same_ids(one, tmp_path / "m.gguf", [*TEXTS, "a <ctl>b", "x<tool>y [x]"])


@pytest.mark.parametrize(
    "options",
    [{"remove_extra_whitespaces": True}, {"normalization_rule_name": "nmt_nfkc"}, {"user_defined_symbols": ["[x]"]}],
    ids=str,
)
def test_what_a_tokenizer_does_to_a_text_first_is_done_or_refused(options, tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bpe(**options))
    one = load_tokenizer(tmp_path)
    try:
        same_ids(one, tmp_path / "m.gguf", ["the river", "the  river ", "\uff21 \ufb01"])
    except UserError as error:
        assert error.code == MODEL and not (tmp_path / "m.gguf").exists()


# ---- what stands in a file ------------------------------------------------------------------------------------------


class Read:
    """A GGUF file as its own package reads it."""

    def __init__(self, path: Path):
        gguf = pytest.importorskip("gguf")
        self.reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in self.reader.tensors}

    def __getitem__(self, key: str):
        return self.reader.fields[key].contents()

    def __contains__(self, key: str) -> bool:
        return key in self.reader.fields


def block_names(*parts: str) -> set[str]:
    return {f"blk.{i}.{part}" for i in range(2) for part in parts}


NORMED = ["attn_norm.weight", "attn_norm.bias"]
GATED = ["attn_norm.weight", "ffn_norm.weight", *(f"attn_{part}.weight" for part in ("q", "k", "v", "output"))]
MLP = ["ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"]
ENDS = {"token_embd.weight", "output_norm.weight"}
QKV = ["attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"]
NAMES = {
    "gpt2": {
        *ENDS, "output_norm.bias", "position_embd.weight",
        *block_names(*NORMED, "ffn_norm.weight", "ffn_norm.bias", *QKV, *(f"{name[:-7]}.bias" for name in QKV)),
    },
    "llama": {*ENDS, "output.weight", *block_names(*GATED, *MLP)},
    "llama_tied": {*ENDS, *block_names(*GATED, *MLP)},
    "llama3": {*ENDS, "output.weight", "rope_freqs.weight", *block_names(*GATED, *MLP)},
    "mixtral": {*ENDS, "output.weight", *block_names(
        *GATED, "ffn_gate_inp.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"
    )},
    "qwen2": {*ENDS, "output.weight", *block_names(*GATED, *MLP, "attn_q.bias", "attn_k.bias", "attn_v.bias")},
    "qwen3": {*ENDS, "output.weight", *block_names(*GATED, *MLP, "attn_q_norm.weight", "attn_k_norm.weight")},
    "gemma": {*ENDS, *block_names(*GATED, *MLP)},
    "falcon": {*ENDS, "output_norm.bias", *block_names(*NORMED, *QKV)},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_tensors_have_llama_cpps_names(name, bpe, tmp_path):
    pytest.importorskip("gguf")
    write_gguf(randomized(name), bpe, tmp_path / "m.gguf", "fp32")
    assert set(Read(tmp_path / "m.gguf").tensors) == NAMES[name]


@every_family
def test_a_file_gives_the_weights_back(name, bpe, tmp_path):
    pytest.importorskip("gguf")
    model, other = randomized(name), randomized(name, seed=1)
    write_gguf(model, bpe, tmp_path / "m.gguf", "fp32")
    fill_from_gguf(other, tmp_path / "m.gguf")
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], tensor, rtol=1e-6, atol=1e-6)


@every_family
@pytest.mark.parametrize("dtype, kind", [("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")])
def test_matrices_have_the_type_and_vectors_stay_in_fp32(name, dtype, kind, bpe, tmp_path):
    pytest.importorskip("gguf")
    model = randomized(name)
    write_gguf(model, bpe, tmp_path / "m.gguf", dtype)
    file = Read(tmp_path / "m.gguf")
    for tensor, found in file.types.items():
        vector = len(file.tensors[tensor].shape) == 1 or "ffn_gate_inp" in tensor
        assert found == ("F32" if vector else kind), tensor
    assert file["general.file_type"] == {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}[kind]
    scaled = name == "llama3"  # the factors of its frequencies are a tensor here
    numbers = sum(int(np.prod(tensor.shape)) for tensor in file.tensors.values())
    assert numbers == sum(p.numel() for p in model.parameters()) + scaled * model.config.head_dim // 2


def test_rows_that_blocks_do_not_divide_go_to_fp16(bpe, tmp_path):
    pytest.importorskip("gguf")
    config = CONFIGS["llama"](**SIZES | GROUPED | {"hidden_size": 72, "num_attention_heads": 4, "head_dim": 16})
    write_gguf(build_model(config), bpe, tmp_path / "m.gguf", "q8_0")
    types = Read(tmp_path / "m.gguf").types
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "F16"
    assert types["blk.0.attn_output.weight"] == types["blk.0.ffn_down.weight"] == "Q8_0"


def test_weights_are_those_of_the_model(bpe, tmp_path):
    pytest.importorskip("gguf")
    model = randomized("qwen2")
    write_gguf(model, bpe, tmp_path / "m.gguf", "fp32")
    file, weights = Read(tmp_path / "m.gguf"), model.state_dict()
    for name, ours in {
        "token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight",
        "blk.1.attn_k.bias": "model.layers.1.self_attn.k_proj.bias",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight", "output_norm.weight": "model.norm.weight",
    }.items():  # fmt: skip
        assert torch.equal(torch.tensor(np.array(file.tensors[name].data)), weights[ours]), name


SHAPES = {"context_length": 96, "embedding_length": 64, "block_count": 2, "attention.head_count": 4}
METADATA = {
    "gpt2": ("gpt2", SHAPES | {"feed_forward_length": 256, "attention.head_count_kv": 4}),
    "llama": ("llama", SHAPES | {"feed_forward_length": 96, "attention.head_count_kv": 2, "rope.dimension_count": 16}),
    "llama_tied": ("llama", {"rope.freq_base": 5e5, "attention.layer_norm_rms_epsilon": 1e-3}),
    "llama_wide_heads": ("llama", {"attention.key_length": 32, "rope.dimension_count": 32}),
    "linear": ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "yarn": ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                       "rope.scaling.original_context_length": 24}),
    "mistral_window": ("llama", SHAPES | {"context_length": 80}),
    "mixtral": ("llama", {"expert_count": 4, "expert_used_count": 2}),
    "qwen2": ("qwen2", SHAPES), "qwen3": ("qwen3", SHAPES | {"attention.key_length": 32}),
    "gemma": ("gemma", SHAPES | {"attention.head_count_kv": 1}),
    "falcon": ("falcon", SHAPES | {"attention.head_count_kv": 1, "attention.layer_norm_epsilon": 1e-5}),
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
def test_the_shape_is_in_the_file(name, bpe, tmp_path):
    pytest.importorskip("gguf")
    architecture, expected = METADATA[name]
    write_gguf(randomized(name), bpe, tmp_path / "m.gguf", "fp32")
    file = Read(tmp_path / "m.gguf")
    assert file["general.architecture"] == architecture
    assert {key: file[f"{architecture}.{key}"] for key in expected} == pytest.approx(expected)


def test_the_tokenizer_is_in_the_file(bpe, tmp_path):
    pytest.importorskip("gguf")
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    one = Tokenizer(bpe.rust, bpe.eos_id, CHAT_START, template)
    write_gguf(randomized("llama"), one, tmp_path / "m.gguf", "fp32")
    file = Read(tmp_path / "m.gguf")
    tokens, kinds = file["tokenizer.ggml.tokens"], file["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 304 and tokens[:300] == [bpe.rust.id_to_token(i) for i in range(300)]
    assert [kinds[i] for i in (0, 1, 2, 3, 299)] == [3, 3, 3, 1, 1] and kinds[300:] == [5] * 4  # control, text, unused
    assert file["tokenizer.ggml.model"] == "gpt2" and file["tokenizer.ggml.pre"] == "gpt-2"
    merges = json.loads(bpe.rust.to_str())["model"]["merges"]
    assert file["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]
    ends = {"eos": bpe.specials[EOS], "bos": bpe.specials[CHAT_START], "eot": bpe.specials[CHAT_END]}
    assert {key: file[f"tokenizer.ggml.{key}_token_id"] for key in ends} == ends
    assert file["tokenizer.ggml.add_bos_token"] is False and file["tokenizer.chat_template"] == template


def test_what_a_tokenizer_does_not_have_is_not_in_the_file(bpe, tmp_path):
    pytest.importorskip("gguf")
    write_gguf(randomized("llama"), bpe, tmp_path / "m.gguf", "fp32")
    file = Read(tmp_path / "m.gguf")
    assert "tokenizer.ggml.bos_token_id" not in file and "tokenizer.chat_template" not in file


# ---- GGUF: what is refused ------------------------------------------------------------------------------------------


def refused(model, tokenizer, out: Path, *words: str) -> None:
    """Assert that nothing is written and that a UserError contains all `words`."""
    with pytest.raises(UserError) as caught:
        write_gguf(model, tokenizer, out / "m.gguf", "fp32")
    assert caught.value.code == MODEL and all(word in str(caught.value) for word in words), str(caught.value)
    assert not list(out.iterdir())


MIXED = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
REFUSED = {
    "bert": ("bert", {}, "bert"),
    "t5": ("t5", {}, "t5"),
    "activation": ("llama", {"hidden_act": "gelu"}, "gelu"),
    "mixed_windows": ("qwen2", MIXED, "windows of 16"),
    "yarn_options": ("llama", {"rope_scaling": YARN | {"beta_fast": 16.0}}, "beta_fast"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_llama_cpp_does_not_have_is_refused(name, bpe, tmp_path):
    pytest.importorskip("gguf")
    family, options, word = REFUSED[name]
    known = CONFIGS[family].__dataclass_fields__
    config = CONFIGS[family](**{key: value for key, value in (SIZES | options).items() if key in known})
    refused(build_model(config), bpe, tmp_path, word)


@pytest.mark.parametrize("kind, options, word", [
    ("unigram", {}, "Unigram"), ("wordpiece", {}, "WordPiece"), ("char", {}, "BPE"),
    ("bpe", {"pattern": r"[\s\S]{1,9}"}, "BPE"), ("bpe", {"normalize": ["lowercase"]}, "BPE"),
])  # fmt: skip
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(kind, options, word, tmp_path):
    pytest.importorskip("gguf")
    one = train_tokenizer([TEXT], kind, vocab_size=300, **options)
    refused(randomized("llama"), one, tmp_path, word)


def test_without_the_package_there_is_one_error_that_names_it(bpe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="gguf package") as caught:
        write_gguf(randomized("llama"), bpe, tmp_path / "m.gguf", "fp32")
    assert caught.value.code == ENVIRONMENT and not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_no_file(bpe, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(OSError):
        write_gguf(randomized("llama"), bpe, tmp_path / "m.gguf", "fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_weights_beyond_the_range_of_fp16_are_refused_in_it(bpe, tmp_path):
    pytest.importorskip("gguf")
    model = randomized("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    write_gguf(model, bpe, tmp_path / "m.gguf", "bf16")
    with pytest.raises(UserError, match=r"not finite, for example lm_head\.weight"):
        write_gguf(model, bpe, tmp_path / "n.gguf", "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_an_export_to_a_full_disk_is_one_error_and_leaves_no_file(saved, tmp_path, capsys):
    pytest.importorskip("gguf")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # bytes that a file may have
    try:
        failed(capsys, "export", saved, tmp_path / "out", "--format", "gguf", code=ENVIRONMENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("out/*"))


# ---- llama2.c -------------------------------------------------------------------------------------------------------

SHARED_HEAD = {"tie_word_embeddings": True}
SHAPES_OF_C = {
    "grouped": GROUPED, "tied": GROUPED | SHARED_HEAD, "full": {"intermediate_size": 80},
    "one_kv_head": {"num_key_value_heads": 1, "intermediate_size": 80},
}  # fmt: skip
FIRST, SECOND = b"", struct.pack("<Ii", 0x616B3432, 1)  # what the two formats begin with


def neighbours(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return rows in llama2.c's order, which rotates channels 2i and 2i + 1 of a head together, not i and i + D/2."""
    rows = [head + half + i for head in range(0, len(weight), head_dim)
            for i in range(head_dim // 2) for half in (0, head_dim // 2)]  # fmt: skip
    return weight[rows]


def header(config, *, tied: bool, first: bool, **changes: int) -> bytes:
    sizes = {
        "dim": config.hidden_size, "hidden_dim": config.intermediate_size, "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads, "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size * (1 if tied or not first else -1),
        "max_seq_len": config.max_position_embeddings,
    }  # fmt: skip
    packed = struct.pack("<7i", *(sizes | changes).values())
    return packed if first else (SECOND + packed + bytes([tied])).ljust(256, b"\0")


def llama2c_file(model: torch.nn.Module, *, first: bool) -> bytes:
    """Write a checkpoint as llama2.c's export.py does."""
    config, weights = model.config, model.state_dict()
    layers = [{key.split(f"layers.{i}.")[1].removesuffix(".weight"): tensor for key, tensor in weights.items()
               if f"layers.{i}." in key} for i in range(config.num_hidden_layers)]  # fmt: skip
    for layer in layers:
        for name in ("self_attn.q_proj", "self_attn.k_proj"):
            layer[name] = neighbours(layer[name], config.head_dim)
    every = lambda name: [layer[name] for layer in layers]  # noqa: E731
    attention = [tensor for part in "qkvo" for tensor in every(f"self_attn.{part}_proj")]
    mlp = [tensor for part in ("gate", "down", "up") for tensor in every(f"mlp.{part}_proj")]
    before, between, last = every("input_layernorm"), every("post_attention_layernorm"), weights["model.norm.weight"]
    embedding, tied = weights["model.embed_tokens.weight"], config.tie_word_embeddings
    tables = [torch.rand(config.max_position_embeddings, config.head_dim // 2) for _ in range(2)]
    if first:
        order = [embedding, *before, *attention, *between, *mlp, last, *tables]
    else:
        order = [*before, *between, last, embedding, *attention, *mlp]
    order += [] if tied else [weights["lm_head.weight"]]
    numbers = b"".join(tensor.contiguous().numpy().astype("<f4").tobytes() for tensor in order)
    return header(config, tied=tied, first=first) + numbers


def llama2c_tokenizer(size: int) -> bytes:
    """Write a tokenizer.bin: control tokens, the bytes, letters, and pieces that join two earlier ones."""
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    joined = ["th", " th", " the", "in", "er", "re", " a", " r"]
    letters = [letter for letter in dict.fromkeys(" " + "".join(joined) + TEXT) if letter.isascii() and letter != "\n"]
    scores = [0.0] * len(pieces) + [-float(i) for i in range(len(joined))] + [-1e6] * len(letters)
    pieces += [*joined, *letters]
    pieces += [f" r{i}" for i in range(size - len(pieces))]  # never made: no piece of a part
    scores += [-1e7] * (size - len(scores))
    rows = [struct.pack("<fi", score, len(piece.encode())) + piece.encode()
            for score, piece in zip(scores, pieces, strict=True)]  # fmt: skip
    return struct.pack("<i", max(len(piece.encode()) for piece in pieces)) + b"".join(rows)


OF_C = {**SIZES, "vocab_size": 400}


@pytest.fixture(scope="module")
def of_c() -> torch.nn.Module:
    return randomized("of_c", families={"of_c": ("llama", OF_C | GROUPED)})


@pytest.fixture
def words(tmp_path) -> Path:
    (tmp_path / "tokenizer.bin").write_bytes(llama2c_tokenizer(400))
    return tmp_path / "tokenizer.bin"


@pytest.mark.parametrize("first", [True, False], ids=["version0", "version1"])
@pytest.mark.parametrize("options", SHAPES_OF_C.values(), ids=SHAPES_OF_C)
@torch.no_grad()
def test_a_checkpoint_of_llama2c_gives_the_models_logits(options, first, words, tmp_path):
    model = randomized("c", families={"c": ("llama", OF_C | options)})
    (tmp_path / "model.bin").write_bytes(llama2c_file(model, first=first))
    import_llama2c(tmp_path / "model.bin", words, tmp_path / "out")
    ids = torch.arange(40)[None] * 7
    opened = folder.load_model(tmp_path / "out")
    torch.testing.assert_close(opened(ids), model(ids))
    assert opened.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert opened.config.num_key_value_heads == model.config.num_key_value_heads


def test_an_imported_folder_is_one_that_every_command_takes(of_c, words, tmp_path, capsys):
    (tmp_path / "model.bin").write_bytes(llama2c_file(of_c, first=True))
    done = llmkit("import", "model.bin", "out", "--tokenizer", "tokenizer.bin", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["files"] == "config.json, model.safetensors, tokenizer.json, tokenizer_config.json"
    options = ["--max-new-tokens", 5, "--temperature", 0, "--precision", "fp32", "--no-compile"]
    said = run_here(capsys, "generate", tmp_path / "out", "the river", *options)
    one = load_tokenizer(tmp_path / "out")
    ids = one.encode_prompt("the river")
    assert ids[0] == one.bos_id == 1 and one.eos_id == 2
    written = list(stream(of_c, ids, max_new_tokens=5, sampling=Sampling(temperature=0), stop=frozenset([2])))
    assert said["text"] == "".join(decode_until_stop(one, ids, written)) and said["tokens"] == len(written)


def test_the_tokenizer_of_llama2c_joins_pieces_by_their_scores(words):
    rust = from_llama2c(words, 400)
    rust.encode_special_tokens = True
    tokens = rust.encode("the river in\n \u00e4<s>", add_special_tokens=False).tokens
    assert tokens == [
        "\u2581the",
        "\u2581r",
        "i",
        "v",
        "er",
        "\u2581",
        "in",
        "<0x0A>",
        "\u2581",
        "<0xC3>",
        "<0xA4>",
        "<",
        "s",
        ">",
    ]
    assert rust.decode(rust.encode("the  river\n\u00e4").ids, skip_special_tokens=True) == "the  river\n\u00e4"


@pytest.mark.parametrize("before", [b"M", b"\n", b""])
@pytest.mark.parametrize("wrong", [b"\xe2", b"\xe2\x82", b"\xff\xff"])
def test_bytes_that_are_no_letter_do_not_end_a_text(before, wrong, words):
    rust = from_llama2c(words, 400)
    one = Tokenizer(rust, 2, "<s>")
    tokens = [*(rust.token_to_id(f"<0x{byte:02X}>") for byte in before + wrong), *one.encode("the river")]
    said = "".join(decode_until_stop(one, [1], tokens))
    assert said.endswith(" the river") and said.startswith(before.decode()) and "\ufffd" in said


def test_a_sentencepiece_model_and_its_tokenizer_bin_are_the_same(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece_bpe(split_digits=True)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    rows = []
    for i in range(theirs.vocab_size()):  # as llama2.c's tokenizer.py writes it
        piece = {1: "\n<s>\n", 2: "\n</s>\n"}.get(i, theirs.id_to_piece(i)).replace("\u2581", " ").encode()
        rows.append(struct.pack("<fi", theirs.get_score(i), len(piece)) + piece)
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", max(map(len, rows)) - 8) + b"".join(rows))
    rust = from_llama2c(tmp_path / "tokenizer.bin", theirs.vocab_size())
    rust.encode_special_tokens = True
    for text in TEXTS:
        assert rust.encode(text, add_special_tokens=False).ids == theirs.encode(text), text


@torch.no_grad()
def test_an_imported_checkpoint_runs_in_llama_cpp(of_c, words, tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    (tmp_path / "model.bin").write_bytes(llama2c_file(of_c, first=False))
    import_llama2c(tmp_path / "model.bin", words, tmp_path / "out")
    model, one = folder.load_model(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    write_gguf(model, one, tmp_path / "m.gguf", "fp32")
    theirs = LlamaCpp(tmp_path / "m.gguf")
    for text in TEXTS:
        assert theirs.encode(text) == one.encode_prompt(text), text
    ids = one.encode_prompt("the river reads")
    torch.testing.assert_close(theirs.logits(ids), of_c(torch.tensor([ids]))[0], rtol=1e-3, atol=1e-3)
    assert Read(tmp_path / "m.gguf")["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]  # unknown, control, control, byte


# ---- llama2.c: what is refused --------------------------------------------------------------------------------------


def replaced(raw: bytes, at: int, number: int) -> bytes:
    return raw[:at] + struct.pack("<i", number) + raw[at + 4 :]


CHECKPOINTS = {
    "empty": lambda first, second: b"",
    "half_a_header": lambda first, second: first[:20],
    "header_alone": lambda first, second: first[:28],
    "truncated": lambda first, second: first[:-4],
    "a_byte_less": lambda first, second: first[:-1],
    "longer": lambda first, second: first + b"\0" * 4,
    "nan": lambda first, second: first[:-4] + struct.pack("<f", float("nan")),
    "second_truncated": lambda first, second: second[:-4],
    "second_longer": lambda first, second: second + b"\0",
    "second_header_cut": lambda first, second: second[:36],
    "magic_alone": lambda first, second: second[:4],
    "quantized": lambda first, second: replaced(second, 4, 2),
    "unknown_version": lambda first, second: replaced(second, 4, 7),
    "no_heads": lambda first, second: replaced(first, 12, 0),
    "odd_heads": lambda first, second: replaced(first, 12, 5),
    "odd_kv_heads": lambda first, second: replaced(first, 16, 3),
    "negative_layers": lambda first, second: replaced(first, 8, -2),
    "no_vocabulary": lambda first, second: replaced(first, 20, 0),
    "no_positions": lambda first, second: replaced(first, 24, 0),
    "huge_width": lambda first, second: replaced(first, 0, 2**30),
    "too_many_layers": lambda first, second: replaced(first, 8, 2**30),
    "text": lambda first, second: b"Once upon a time there was a checkpoint. " * 99,
    "zeros": lambda first, second: bytes(5000),
}


@pytest.mark.parametrize("change", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_one_error(change, of_c, words, tmp_path, capsys):
    broken = change(llama2c_file(of_c, first=True), llama2c_file(of_c, first=False))
    (tmp_path / "model.bin").write_bytes(broken)
    said = failed(capsys, "import", tmp_path / "model.bin", tmp_path / "out", "--tokenizer", words)
    assert "model.bin" in said and not (tmp_path / "out").exists()


def test_a_header_of_many_layers_is_refused_before_they_are_built(of_c, words, tmp_path):
    (tmp_path / "model.bin").write_bytes(replaced(llama2c_file(of_c, first=True), 8, 500))
    built: list[type] = []
    hook = torch.nn.modules.module.register_module_module_registration_hook(
        lambda module, name, submodule: built.append(type(submodule))
    )
    with pytest.raises(UserError), hook:
        import_llama2c(tmp_path / "model.bin", words, tmp_path / "out")
    assert len(built) < 500


WORDS = {
    "truncated": lambda raw: raw[:-1],
    "longer": lambda raw: raw + b"\0",
    "empty": lambda raw: b"",
    "of_another_size": lambda raw: llama2c_tokenizer(401),
    "smaller": lambda raw: llama2c_tokenizer(399),
    "no_text": lambda raw: raw[:-2] + b"\xff\xff",
    "negative_length": lambda raw: replaced(raw, 8, -3),
}


@pytest.mark.parametrize("change", WORDS.values(), ids=WORDS)
def test_a_tokenizer_that_does_not_fit_is_one_error(change, of_c, words, tmp_path, capsys):
    (tmp_path / "model.bin").write_bytes(llama2c_file(of_c, first=True))
    words.write_bytes(change(words.read_bytes()))
    said = failed(capsys, "import", tmp_path / "model.bin", tmp_path / "out", "--tokenizer", words)
    assert "tokenizer.bin" in said and not (tmp_path / "out").exists()


def test_another_tokenizer_may_be_smaller_but_not_larger(of_c, bpe, tmp_path, capsys):
    (tmp_path / "model.bin").write_bytes(llama2c_file(of_c, first=True))
    bpe.save(tmp_path / "small")
    import_llama2c(tmp_path / "model.bin", tmp_path / "small", tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").encode("the river") == bpe.encode("the river")
    large = train_tokenizer([TEXT], vocab_size=401, special_tokens=[f"<{i}>" for i in range(100)])
    large.save(tmp_path / "large")
    said = failed(capsys, "import", tmp_path / "model.bin", tmp_path / "no", "--tokenizer", tmp_path / "large")
    assert len(large) == 401 and "401" in said and "400" in said and not (tmp_path / "no").exists()


def test_missing_files_and_a_folder_that_is_not_empty_are_errors(of_c, words, tmp_path, capsys):
    (tmp_path / "model.bin").write_bytes(llama2c_file(of_c, first=True))
    assert "nothing.bin" in failed(capsys, "import", "nothing.bin", tmp_path / "out", "--tokenizer", words, code=2)
    assert "no.bin" in failed(
        capsys, "import", tmp_path / "model.bin", tmp_path / "out", "--tokenizer", "no.bin", code=2
    )
    before = sorted(tmp_path.iterdir())
    said = failed(capsys, "import", tmp_path / "model.bin", tmp_path, "--tokenizer", words, code=2)
    assert "not empty" in said and sorted(tmp_path.iterdir()) == before


# ---- export through the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, kind", [("fp32", "F32"), ("q8_0", "Q8_0"), ("bf16", "BF16"), ("fp16", "F16")])
def test_export_to_gguf(saved, dtype, kind, tmp_path, capsys):
    pytest.importorskip("gguf")
    shown = run_here(capsys, "export", saved, tmp_path / "out", "--format", "gguf", "--dtype", dtype)
    assert shown["files"] == "model.gguf" and float(shown["equal_greedy_tokens"]) > 0.8
    assert (float(shown["largest_logit_difference"]) < 1e-5) == (dtype == "fp32")
    assert Read(tmp_path / "out" / "model.gguf").types["blk.0.ffn_up.weight"] == kind
    shown = run_here(capsys, "export", saved, tmp_path / "mine.gguf", "--format", "gguf", "--dtype", dtype)
    assert shown["files"] == "mine.gguf" and Read(tmp_path / "mine.gguf").types["blk.0.ffn_up.weight"] == kind


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_export_to_a_folder(saved, dtype, tmp_path, capsys):
    run_here(capsys, "export", saved, tmp_path / "out", "--format", "hf", "--dtype", dtype)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {kinds[dtype]}


@pytest.mark.parametrize("form, dtype, words", [
    ("hf", "q8_0", ["--dtype", "hf", "fp32"]), ("gguf", "int4", ["--dtype", "q8_0"]), ("peft", "q8_0", ["--dtype"]),
    ("peft", "fp32", ["no adapter"]), ("ggml", "fp32", ["--format", "gguf"]),
])  # fmt: skip
def test_a_wrong_format_or_dtype_is_one_error(saved, form, dtype, words, tmp_path, capsys):
    code = MODEL if words == ["no adapter"] else 2
    said = failed(capsys, "export", saved, tmp_path / "out", "--format", form, "--dtype", dtype, code=code)
    assert all(word in said for word in words) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["hf", "gguf", "peft"])
def test_a_folder_that_is_not_empty_is_left_alone(saved, form, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert "not empty" in failed(capsys, "export", saved, tmp_path, "--format", form, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_export_that_is_refused_leaves_nothing(tmp_path, capsys):
    pytest.importorskip("gguf")
    folder.save_model(randomized("llama"), tmp_path / "model")
    train_tokenizer([TEXT], "unigram", vocab_size=300).save(tmp_path / "model")
    assert "llama.cpp" in failed(capsys, "export", tmp_path / "model", tmp_path / "out", "--format", "gguf")
    assert not list(tmp_path.glob("out/*"))
