"""GGUF files for llama.cpp: weights under its names and in its layouts, and the tokenizer, in one file.

What differs by family is in `models.family.Gguf`; the tests run the files in llama.cpp.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmkit.errors import MachineError, ModelError
from llmkit.files import write_beside
from llmkit.models import FAMILIES, family_of
from llmkit.models.family import Gguf
from llmkit.models.folder import check_finite
from llmkit.models.layers import rope_frequencies
from llmkit.tokenizer.fast import PATTERNS, find_split_pattern
from llmkit.tokenizer.foreign import SPACE
from llmkit.tokenizer.tokenizer import Tokenizer

TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # --dtype -> GGUF's tensor type
PRE = {"gpt2": "gpt-2", "llama3": "llama-bpe", "qwen2": "qwen2"}  # a name in PATTERNS -> llama.cpp's name for it
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of tokens


def write_gguf(model: nn.Module, tokenizer: Tokenizer, path: Path, dtype: str, name: str | None = None) -> None:
    """Write a model to one GGUF file, which appears whole or not at all.

    dtype  a name in TYPES; vectors stay in fp32. Under q8_0 a matrix whose rows are no multiple of 32 becomes fp16
    name   what llama.cpp shows as the model's name; None: the file's

    Raises ModelError for a family, an activation or a tokenizer that llama.cpp does not have.
    """
    gguf, config, spec = import_gguf(), model.config, family_of(model.config).gguf
    if spec is None:
        known = ", ".join(name for name, family in FAMILIES.items() if family.gguf)
        raise ModelError("GGUF is not written for this family", got=config.model_type, expected=known)
    check_supported(config, spec)
    with write_beside(path) as temporary:
        writer = gguf.GGUFWriter(temporary, spec.architecture)
        writer.add_name(name or path.stem)
        add_config(writer, config, spec, gguf)
        add_tokenizer(writer, tokenizer, config.vocab_size)
        writer.add_file_type(gguf.LlamaFileType[f"{'MOSTLY_' if dtype != 'fp32' else 'ALL_'}{TYPES[dtype]}"])
        name_of = tensor_names(config, spec, gguf)
        for ours, tensor in tensors_of(model, spec):
            named, kind = name_of(ours), gguf.GGMLQuantizationType[TYPES[dtype]]
            if tensor.dim() < 2 or ".ffn_gate_inp" in named:
                kind = gguf.GGMLQuantizationType.F32  # vectors, and the router
            elif kind == gguf.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
                kind = gguf.GGMLQuantizationType.F16
            if kind == gguf.GGMLQuantizationType.F16:
                check_finite({ours: tensor.half()}, path)
            writer.add_tensor(named, gguf.quants.quantize(tensor.float().cpu().numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@torch.no_grad()
def fill_from_gguf(model: nn.Module, path: Path) -> None:
    """Give a model the weights of the file that `write_gguf` has made of it, as they were rounded.

    Where a weight went is found by sending its places through the same layout: what is checked is that none is missing
    or rounded too much, not the layout, which tests compare with llama.cpp. Raises ModelError for a missing tensor.
    """
    gguf, config, spec = import_gguf(), model.config, family_of(model.config).gguf
    name_of = tensor_names(config, spec, gguf)
    stored = {one.name: one for one in gguf.GGUFReader(path).tensors}
    for name, tensor in model.state_dict().items():
        dtype = torch.int32 if tensor.numel() < 2**31 else torch.int64
        sent = spec.layout(config, name, torch.arange(tensor.numel(), dtype=dtype).view(tensor.shape))
        first = spec.layout(config, name, torch.zeros(tensor.shape[:1], dtype=dtype)) if tensor.dim() == 1 else {}
        tensor.fill_(torch.nan)
        for ours, places in sent.items():
            if (one := stored.get(name_of(ours))) is None:
                raise ModelError("the file lacks a tensor of the model", at=path, expected=name_of(ours))
            values = np.require(gguf.quants.dequantize(one.data, one.tensor_type), requirements="W")
            added = int(first[ours][0]) if first else 0  # Gemma's norms are stored + 1
            tensor.view(-1)[(places - added).flatten()] = torch.from_numpy(values).flatten() - added


def import_gguf() -> Any:
    """Return the gguf package. Raise MachineError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise MachineError("GGUF needs the gguf package", fix="pip install 'llmkit[gguf]'") from None
    return gguf


def tensor_names(config: Any, spec: Gguf, gguf: Any) -> Callable[[str], str]:
    """Return a function from our name of a tensor to llama.cpp's."""
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == spec.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    return lambda ours: names.get_name(ours, (".weight", ".bias")) or ours


# ---- the architecture -----------------------------------------------------------------------------------------------


def rope_type(config: Any, spec: Gguf) -> str | None:
    """Return the name of a config's scaling of rotary positions, None without any."""
    return (config.rope_scaling or {}).get("rope_type") if spec.rope else None


def check_supported(config: Any, spec: Gguf) -> None:
    """Raise a ModelError if a config uses a feature that llama.cpp does not support."""
    if spec.activation and config.hidden_act != spec.activation:
        what = "llama.cpp knows one activation for this family"
        raise ModelError(what, got=config.hidden_act, expected=spec.activation)
    scaled = not spec.llama3_rope and rope_type(config, spec) == "llama3"
    for what, is_there in (spec.unsupported(config) | {"rope_type llama3": scaled}).items():
        if is_there:
            raise ModelError(f"llama.cpp has no {spec.architecture} with {what}", got=config.model_type)


def add_config(writer: Any, config: Any, spec: Gguf, gguf: Any) -> None:
    """Write the numbers from which llama.cpp builds its graph."""
    windows = {window for window in config.windows if window is not None}
    longest = config.max_position_embeddings
    if windows and None in config.windows:
        raise ModelError("llama.cpp needs one window in all layers of this family", got=f"windows of {min(windows)}")
    # llama.cpp attends to all of the text: within the first window that is the same.
    writer.add_context_length(min([longest, *windows]))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_vocab_size(config.vocab_size)
    if spec.rms_norm:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if experts := family_of(config).experts(config):
        writer.add_expert_count(experts[0])
        writer.add_expert_used_count(experts[1])
    if not spec.rope:
        return
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if (kind := rope_type(config, spec)) in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(config.rope_scaling["factor"])
    if kind == "yarn":
        if config.rope_scaling.keys() - {"rope_type", "factor", "original_max_position_embeddings"}:
            raise ModelError("YaRN's further options are not written to GGUF", got=str(config.rope_scaling))
        writer.add_rope_scaling_orig_ctx_len(config.rope_scaling["original_max_position_embeddings"])


def tensors_of(model: nn.Module, spec: Gguf) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights, by our names, in llama.cpp's layout."""
    config = model.config
    for name, tensor in model.state_dict().items():
        yield from spec.layout(config, name, tensor).items()
    if rope_type(config, spec) == "llama3":  # the factor of each channel, as a tensor of its own
        scalings = (None, config.rope_scaling)
        plain, scaled = (rope_frequencies(config.head_dim, config.rope_theta, scaling)[0] for scaling in scalings)
        yield "rope_freqs.weight", plain / scaled


# ---- the tokenizer --------------------------------------------------------------------------------------------------


def add_tokenizer(writer: Any, tokenizer: Tokenizer, size: int) -> None:
    """Write the vocabulary, token types, merges or scores, special tokens and the chat template."""
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
    """Return llama.cpp's names for a tokenizer's model and for how it splits text."""
    bpe, pattern = spec["model"]["type"] == "BPE", find_split_pattern(spec["pre_tokenizer"] or {})
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
    """Return whether a SentencePiece BPE puts a space before every text; None if it treats spaces in another way."""
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
