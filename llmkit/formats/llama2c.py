"""Import llama2.c checkpoints as a Hugging Face folder, which every command accepts."""

import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from llmkit.errors import ModelError
from llmkit.files import write_beside
from llmkit.models import build_model, llama, shape_problems
from llmkit.models.folder import check_finite, save_model
from llmkit.tokenizer.foreign import from_llama2c
from llmkit.tokenizer.load import load_tokenizer
from llmkit.tokenizer.tokenizer import Tokenizer

MAGIC, HEADER_BYTES = 0x616B3432, 256  # of version 1: "ak42", and the size of its header. Version 0 has no magic number


def import_llama2c(path: Path, tokenizer: Path, out: Path) -> None:
    """Write a folder from a llama2.c checkpoint (Karpathy 2023) in version 0 or 1, which hold fp32 weights.

    tokenizer  the checkpoint's tokenizer.bin, or any file that `load_tokenizer` reads
    """
    raw = path.read_bytes()
    try:
        config, start, version = read_header(raw)
    except (struct.error, IndexError):
        raise ModelError("the file is too short for a llama2.c checkpoint", at=path) from None
    except ValueError as error:
        raise ModelError(f"the llama2.c checkpoint can't be read: {error}", at=path) from None
    layout = weight_layout(config, version)
    sizes = [math.prod(shape) for _, shape in layout]
    expected = start + 4 * sum(sizes)
    if len(raw) != expected:
        got = f"{len(raw)} bytes"
        raise ModelError("the file's size contradicts its header", at=path, got=got, expected=f"{expected} bytes")
    if tokenizer.suffix == ".bin":
        rust = from_llama2c(tokenizer, config.vocab_size)
        loaded_tokenizer = Tokenizer(rust, rust.token_to_id("</s>"), "<s>")
    else:
        loaded_tokenizer = load_tokenizer(tokenizer)
    if (size := len(loaded_tokenizer)) > config.vocab_size:
        message = "the tokenizer has more tokens than the model"
        raise ModelError(message, at=tokenizer, got=size, expected=f"at most {config.vocab_size}")
    model = build_model(config, device="meta", seed=None)
    numbers = torch.frombuffer(bytearray(raw[start:]), dtype=torch.float32)
    state: dict[str, Tensor] = {}
    for (name, shape), part in zip(layout, numbers.split(sizes), strict=True):
        if "{}" in name:
            state |= {name.format(layer): tensor for layer, tensor in enumerate(part.view(shape))}
        elif name:
            state[name] = part.view(shape)
    for name, tensor in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = deinterleave_rotary(tensor, config.head_dim)
        state[name] = tensor.contiguous()
    check_finite(state, path)
    model.load_state_dict(state, assign=True)
    with write_beside(out) as folder:
        save_model(model, folder, **loaded_tokenizer.config_ids)
        loaded_tokenizer.save(folder)


def read_header(raw: bytes) -> tuple[llama.Config, int, int]:
    """Return the Config, the byte at which the weights begin, and the version.

    Raise ValueError if the header is invalid, struct.error or IndexError if it is too short.
    """
    version, begin = 0, 0
    if struct.unpack_from("<I", raw)[0] == MAGIC:
        version, begin = struct.unpack_from("<i", raw, 4)[0], 8
        if version != 1:
            raise ValueError(f"version {version} is not supported; versions 0 and 1 hold fp32 weights")
    width, inner, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", raw, begin)
    tied = bool(raw[begin + 28]) if version else vocab > 0
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide a hidden size of {width}")
    config = llama.Config(
        vocab_size=abs(vocab),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        tie_word_embeddings=tied,
    )
    for key, reason in shape_problems(config):
        raise ValueError(f"{key} {reason}")
    return config, HEADER_BYTES if version else 28, version


Layout = list[tuple[str, tuple[int, ...]]]  # names and shapes in file order; {} stands for all layers, "" is skipped


def weight_layout(config: llama.Config, version: int) -> Layout:
    """Return the names and shapes of the weights in the order in which a version stores them.

    Version 0 stores the norms among the matrices, and two tables of RoPE angles before the head.
    """
    layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    block = "model.layers.{}."
    embedding = ("model.embed_tokens.weight", (config.vocab_size, width))
    head = [] if config.tie_word_embeddings else [("lm_head.weight", (config.vocab_size, width))]
    attention_norm = (f"{block}input_layernorm.weight", (layers, width))
    mlp_norm = (f"{block}post_attention_layernorm.weight", (layers, width))
    final_norm = ("model.norm.weight", (width,))
    attention = [
        (f"{block}self_attn.q_proj.weight", (layers, width, width)),
        (f"{block}self_attn.k_proj.weight", (layers, keys, width)),
        (f"{block}self_attn.v_proj.weight", (layers, keys, width)),
        (f"{block}self_attn.o_proj.weight", (layers, width, width)),
    ]
    mlp = [
        (f"{block}mlp.gate_proj.weight", (layers, inner, width)),
        (f"{block}mlp.down_proj.weight", (layers, width, inner)),
        (f"{block}mlp.up_proj.weight", (layers, inner, width)),
    ]
    if version == 1:
        return [attention_norm, mlp_norm, final_norm, embedding, *attention, *mlp, *head]
    angles = ("", (config.max_position_embeddings, config.head_dim // 2))
    return [embedding, attention_norm, *attention, mlp_norm, *mlp, final_norm, angles, angles, *head]


def deinterleave_rotary(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head from RoPE pairs of adjacent channels to pairs half a head apart."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
