"""Other people's checkpoints made into a Hugging Face folder, which every command takes."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from llmkit.errors import ModelError
from llmkit.models import build_model, llama, shape_problems
from llmkit.models.folder import save_model
from llmkit.tokenizer.foreign import from_llama2c
from llmkit.tokenizer.tokenizer import Tokenizer, load_tokenizer

MAGIC, HEADER = 0x616B3432, 256  # "ak42": what llama2.c's second format begins with, and the bytes before its weights


def import_llama2c(path: Path, tokenizer: Path, out: Path) -> None:
    """A .bin of llama2.c (Karpathy 2023), in its first format or version 1: fp32 weights one after another.

    tokenizer  its tokenizer.bin, or any file that `load_tokenizer` takes
    """
    raw = path.read_bytes()
    try:
        config, start, first = read_header(raw)
    except (struct.error, IndexError):
        raise ModelError("the file is too short for a checkpoint of llama2.c", at=path) from None
    except ValueError as error:
        raise ModelError(f"this is no checkpoint of llama2.c: {error}", at=path) from None
    order = version0(config) if first else version1(config)
    needed = sum(math.prod(shape) for _, shape in order)
    if len(raw) - start != 4 * needed:
        raise ModelError(
            "the file has another size than its header says",
            at=path,
            got=f"{len(raw)} bytes",
            expected=f"{start + 4 * needed} bytes",
        )
    if tokenizer.suffix == ".bin":
        rust = from_llama2c(tokenizer, config.vocab_size)
        words = Tokenizer(rust, rust.token_to_id("</s>"), "<s>")
    else:
        words = load_tokenizer(tokenizer)
    if len(words) > config.vocab_size:
        raise ModelError(
            "the tokenizer has more tokens than the model", at=tokenizer, got=len(words), expected=config.vocab_size
        )
    model = build_model(config, device="meta", seed=None)
    numbers = torch.frombuffer(bytearray(raw[start:]), dtype=torch.float32)
    found: dict[str, Tensor] = {}
    for (name, shape), part in zip(order, numbers.split([math.prod(shape) for _, shape in order]), strict=True):
        if "{}" in name:
            for layer, tensor in enumerate(part.view(shape)):
                found[name.format(layer)] = tensor
        elif name:
            found[name] = part.view(shape)
    for name in [name for name in found if name.endswith(("q_proj.weight", "k_proj.weight"))]:
        found[name] = pairs_apart(found[name], config.head_dim)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in found.items()}, assign=True)
    save_model(model, out, eos_token_ids=words.stop_ids, bos_token_id=words.bos_id)
    words.save(out)


def read_header(raw: bytes) -> tuple[llama.Config, int, bool]:
    """The Config, where the weights begin, and whether it is the first format."""
    first = struct.unpack_from("<I", raw)[0] != MAGIC
    at = 0 if first else 8
    if not first and (version := struct.unpack_from("<i", raw, 4)[0]) != 1:
        raise ValueError(f"version {version} holds quantized weights; only fp32 ones are read")
    width, inner, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", raw, at)
    tied = vocab > 0 if first else bool(raw[at + 28])
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
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
    return config, at + 28 if first else HEADER, first


Order = list[tuple[str, tuple[int, ...]]]  # names and shapes, one after another; {}: of all layers; "": not a weight


def block_matrices(config: llama.Config) -> Order:
    """The four matrices of attention and the three of the MLPs, each of all layers."""
    layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    block = "model.layers.{}."
    return [
        (f"{block}self_attn.q_proj.weight", (layers, width, width)),
        (f"{block}self_attn.k_proj.weight", (layers, keys, width)),
        (f"{block}self_attn.v_proj.weight", (layers, keys, width)),
        (f"{block}self_attn.o_proj.weight", (layers, width, width)),
        (f"{block}mlp.gate_proj.weight", (layers, inner, width)),
        (f"{block}mlp.down_proj.weight", (layers, width, inner)),
        (f"{block}mlp.up_proj.weight", (layers, inner, width)),
    ]


def norms(config: llama.Config) -> Order:
    layers, width = config.num_hidden_layers, config.hidden_size
    return [
        ("model.layers.{}.input_layernorm.weight", (layers, width)),
        ("model.layers.{}.post_attention_layernorm.weight", (layers, width)),
        ("model.norm.weight", (width,)),
    ]


def version0(config: llama.Config) -> Order:
    """The first format: the norms stand among the matrices, and tables of angles before the head."""
    before, between, last = norms(config)
    matrices = block_matrices(config)
    table = ("", (config.max_position_embeddings, config.head_dim // 2))
    order = [embedding(config), before, *matrices[:4], between, *matrices[4:], last, table, table]
    return order + head(config)


def version1(config: llama.Config) -> Order:
    return [*norms(config), embedding(config), *block_matrices(config), *head(config)]


def embedding(config: llama.Config) -> tuple[str, tuple[int, int]]:
    return "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)


def head(config: llama.Config) -> Order:
    return [] if config.tie_word_embeddings else [("lm_head.weight", (config.vocab_size, config.hidden_size))]


def pairs_apart(weight: Tensor, head_dim: int) -> Tensor:
    """Rows for channels that turn with their neighbour, in the order for channels half a head apart."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
