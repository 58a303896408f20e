"""GGUF files for llama.cpp: weights under its names and in its layouts, and the tokenizer, in one file.

What llama.cpp expects of each family was read off its loader and its own converter; the tests run the files in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmkit.errors import MachineError, ModelError
from llmkit.files import temporary_path
from llmkit.models.layers import rope_frequencies
from llmkit.tokenizer.foreign import SPACE
from llmkit.tokenizer.tokenizer import PATTERNS, Tokenizer, split_pattern

# model_type -> llama.cpp's name of the architecture, and the activation that its graph has
ARCHITECTURES = {
    "gpt2": ("gpt2", "gelu_pytorch_tanh"),
    "llama": ("llama", "silu"),
    "mistral": ("llama", "silu"),
    "mixtral": ("llama", "silu"),
    "qwen2": ("qwen2", "silu"),
    "qwen3": ("qwen3", "silu"),
    "gemma": ("gemma", "gelu_pytorch_tanh"),
    "falcon": ("falcon", "gelu"),
}
TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # --dtype -> GGUF's tensor type
PRE = {"gpt2": "gpt-2", "llama3": "llama-bpe", "qwen2": "qwen2"}  # a name in PATTERNS -> llama.cpp's name for it
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of tokens


def write_gguf(model: nn.Module, tokenizer: Tokenizer, path: Path, dtype: str, name: str | None = None) -> None:
    """Write a model to one GGUF file, which appears whole or not at all.

    dtype  a name in TYPES; vectors stay in fp32, and matrices whose rows no block of 32 divides go to fp16 under q8_0
    name   what llama.cpp shows of it; None: as the file is called

    Raises UserError for a family, an activation or a tokenizer that llama.cpp does not have.
    """
    try:
        import gguf
    except ImportError:
        raise MachineError("GGUF needs the gguf package", fix="pip install 'llmkit[gguf]'") from None
    config = model.config
    architecture, activation = ARCHITECTURES.get(config.model_type, (None, None))
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError("GGUF is not written for this family", got=config.model_type, expected=known)
    if (chosen := getattr(config, "hidden_act", activation)) != activation:
        raise ModelError("llama.cpp knows one activation for this family", got=chosen, expected=activation)
    refuse_unknown(config, architecture)
    half = temporary_path(path)
    writer = gguf.GGUFWriter(half, architecture)
    try:
        writer.add_name(name or path.stem)
        add_config(writer, config, gguf)
        add_tokenizer(writer, tokenizer, config.vocab_size)
        writer.add_file_type(gguf.LlamaFileType[f"{'MOSTLY_' if dtype != 'fp32' else 'ALL_'}{TYPES[dtype]}"])
        names = gguf.get_tensor_name_map(
            next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture), config.num_hidden_layers
        )
        for ours, tensor in layouts(model):
            named, kind = names.get_name(ours, (".weight", ".bias")) or ours, gguf.GGMLQuantizationType[TYPES[dtype]]
            if tensor.dim() < 2 or ".ffn_gate_inp" in named:
                kind = gguf.GGMLQuantizationType.F32  # vectors, and the router
            elif kind == gguf.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
                kind = gguf.GGMLQuantizationType.F16
            writer.add_tensor(named, gguf.quants.quantize(tensor.float().cpu().numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def refuse_unknown(config: Any, architecture: str) -> None:
    """Raise a UserError for what a Config may have and llama.cpp's graph of its family has not."""
    scaling = (getattr(config, "rope_scaling", None) or {}).get("rope_type")
    wrong = {
        "biases of attention": architecture in ("qwen3", "gemma") and config.attention_bias,
        "biases": architecture == "falcon" and config.bias,
        "a head of its own": architecture == "gemma" and not config.tie_word_embeddings,
        "rope_type llama3": architecture != "llama" and scaling == "llama3",
    }
    for what, there in wrong.items():
        if there:
            raise ModelError(f"llama.cpp has no {architecture} with {what}", got=config.model_type)


# ---- the architecture -----------------------------------------------------------------------------------------------


def add_config(writer: Any, config: Any, gguf: Any) -> None:
    """What llama.cpp builds its graph from."""
    windows = {window for window in config.windows if window is not None}
    longest = config.max_position_embeddings
    if windows and None in config.windows:
        raise ModelError("llama.cpp has no windows in some of this family's layers", got=f"windows of {min(windows)}")
    # llama.cpp attends to all of the text: within the first window that is the same.
    writer.add_context_length(min([longest, *windows]))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_vocab_size(config.vocab_size)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if hasattr(config, "num_local_experts"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if not hasattr(config, "rope_theta"):
        return
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling.get("rope_type") == "yarn":
        if scaling.keys() - {"rope_type", "factor", "original_max_position_embeddings"}:
            raise ModelError("YaRN's further options are not written to GGUF", got=str(scaling))
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def layouts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights, by our names, as llama.cpp wants them."""
    config = model.config
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            yield name.replace("gate_up_proj", "gate_proj.weight"), gate
            yield name.replace("gate_up_proj", "up_proj.weight"), up
        elif name.endswith("experts.down_proj"):
            yield f"{name}.weight", tensor
        elif ARCHITECTURES[config.model_type][0] == "llama" and re.search(r"\.[qk]_proj\.", name):
            heads = tensor.unflatten(0, (-1, 2, config.head_dim // 2))  # there a channel turns with its neighbour
            yield name, heads.transpose(1, 2).flatten(0, 2)
        elif config.model_type == "gemma" and name.endswith("norm.weight"):
            yield name, tensor + 1
        else:
            yield name, tensor
    scaling = getattr(config, "rope_scaling", None) or {}
    if scaling.get("rope_type") == "llama3":  # the factor of each channel, as a tensor of its own
        plain, scaled = (rope_frequencies(config.head_dim, config.rope_theta, by)[0] for by in (None, scaling))
        yield "rope_freqs.weight", plain / scaled


# ---- the tokenizer --------------------------------------------------------------------------------------------------


def add_tokenizer(writer: Any, tokenizer: Tokenizer, size: int) -> None:
    """The vocabulary, its kinds and merges or scores, control tokens and the chat template."""
    spec = json.loads(tokenizer.rust.to_str())
    kind, pre = kind_of(spec)
    added = tokenizer.rust.get_added_tokens_decoder()
    names = {i: token for token, i in tokenizer.rust.get_vocab(with_added_tokens=True).items()}
    tokens, kinds = [], []
    for i in range(size):  # a model may have more rows than its tokenizer has tokens
        tokens.append(names.get(i, f"[PAD{i}]"))
        if i not in names:
            kinds.append(UNUSED)
        elif i in added:
            unknown = kind == "llama" and names[i] == spec["model"].get("unk_token")
            kinds.append(UNKNOWN if unknown else CONTROL if added[i].special else USER_DEFINED)
        else:
            kinds.append(BYTE if kind == "llama" and re.fullmatch("<0x[0-9A-F]{2}>", names[i]) else NORMAL)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [tuple(merge) for merge in spec["model"]["merges"]]
    if kind == "gpt2":
        writer.add_token_merges([" ".join(merge) for merge in merges])
    else:
        ranks = {left + right: -float(rank) for rank, (left, right) in reversed(list(enumerate(merges)))}
        writer.add_token_scores([ranks.get(token, -1e9) for token in tokens])
        writer.add_add_space_prefix(bool(space_prefix(spec)))
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_add_bos_token(bool(tokenizer.prefix))
    if tokenizer.end_of_turn_id != tokenizer.eos_id:
        writer.add_eot_token_id(tokenizer.end_of_turn_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def kind_of(spec: dict[str, Any]) -> tuple[str, str]:
    """llama.cpp's names for what a tokenizer.json describes, and for how it cuts text."""
    bpe, pattern = spec["model"]["type"] == "BPE", split_pattern(spec["pre_tokenizer"] or {})
    plain = spec["normalizer"] is None or spec["normalizer"] == {"type": "NFC"}
    if bpe and not spec["model"].get("byte_fallback") and pattern in PATTERNS.values() and plain:
        return "gpt2", PRE[next(name for name, regex in PATTERNS.items() if regex == pattern)]
    if bpe and spec["model"].get("byte_fallback") and space_prefix(spec) is not None:
        return "llama", "default"
    raise ModelError(
        "llama.cpp has no tokenizer of this kind",
        got=f"{spec['model']['type']}, cut by {pattern or 'other means'}",
        expected="byte-level BPE that cuts as gpt2, llama3 or qwen2, or a SentencePiece BPE without normalization",
    )


def space_prefix(spec: dict[str, Any]) -> bool | None:
    """Whether a SentencePiece BPE puts a space before every text; None where it does more with spaces, or less."""
    normalizer, cut = spec["normalizer"] or {}, spec["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    prepends = {"type": "Prepend", "prepend": SPACE}
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if cut.get("type") == "Metaspace" and not steps and not cut["split"] and cut["replacement"] == SPACE:
        return cut["prepend_scheme"] != "never"
    no_spaces_left = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if cut in ({}, no_spaces_left) and steps in ([replaces], [prepends, replaces]):
        return prepends in steps
    return None
