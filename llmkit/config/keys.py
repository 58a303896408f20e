"""List the keys of a config with type, default and meaning, and write its JSON schema for editors."""

import inspect
import re
import typing
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined

from llmkit.config.fields import Choice
from llmkit.config.schema import Config
from llmkit.errors import UserError, did_you_mean

YAML_WORDS = {None: "null", True: "true", False: "false"}
# Meanings of the options of models, optimizers and so on, for those that a docstring leaves out: one name, one meaning.
MEANINGS = {
    "vocab_size": "Tokens of the vocabulary; null: the tokenizer's.",
    "hidden_size": "Width: numbers per token between the blocks.",
    "intermediate_size": "Width inside the MLP; null: by the family's rule.",
    "num_hidden_layers": "Depth: number of blocks.",
    "num_decoder_layers": "Number of blocks of the decoder; null: as many as the encoder has.",
    "num_attention_heads": "Heads of the queries.",
    "num_key_value_heads": "Heads of keys and values, which queries share; null: as many as queries have.",
    "head_dim": "Numbers per head; null: hidden_size / num_attention_heads.",
    "hidden_act": "Activation of the MLP.",
    "feed_forward_proj": "Activation of the MLP, gated or not.",
    "max_position_embeddings": "The longest position that the model can read.",
    "rope_theta": "Base of the rotary position frequencies.",
    "rope_scaling": "Scaling of rotary positions: {rope_type: linear, llama3 or yarn, factor: 8.0, ...}.",
    "sliding_window": "Tokens back that attention sees; null: all.",
    "use_sliding_window": "Whether sliding_window applies.",
    "max_window_layers": "The sliding window applies to blocks from this one on.",
    "num_local_experts": "Experts in a block.",
    "num_experts_per_tok": "Experts that a token is sent to.",
    "router_aux_loss_coef": "Weight of the loss that balances the load of the experts.",
    "relative_attention_num_buckets": "Buckets of distances between positions.",
    "relative_attention_max_distance": "Distances from here on share a bucket.",
    "decoder_start_token_id": "The token that a decoder begins with.",
    "type_vocab_size": "Kinds of segments; only the first is used.",
    "bias": "Biases in the linear layers.",
    "attention_bias": "Biases in the projections of attention.",
    "mlp_bias": "Biases in the MLP.",
    **dict.fromkeys(("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps"), "Added to the variance in norms."),
    "tie_word_embeddings": "The head uses the embedding's weights.",
    "initializer_range": "Standard deviation of the initial weights.",
    "init": "How weights are initialised; zero: each block starts as the identity.",
    **dict.fromkeys(("dropout_rate", "embd_pdrop", "resid_pdrop", "hidden_dropout", "hidden_dropout_prob"), "Dropout."),
    **dict.fromkeys(("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"), "Dropout of attention."),
    "mask_fraction": "Share of a row's tokens that are predicted.",
    "random_fraction": "Share of these that are replaced by random tokens.",
    "keep_fraction": "Share of these that stay visible; the others are masked.",
    "noise_fraction": "Share of a row's tokens that is cut out.",
    "mean_span": "Average length of a span in tokens.",
    "r": "Rank of the factors.",
    "dropout": "Dropout on the input of the adapter.",
    "modules_to_save": "Ends of names of modules that are trained as a whole beside: embed_tokens, lm_head, norm.",
    "rslora": "Scale by alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732).",
    "lr": "Highest learning rate.",
    "embedding_lr": "Learning rate of embeddings; null: lr.",
    "head_lr": "Learning rate of a head with weights of its own; null: lr.",
    "scalar_lr": "Learning rate of norms and biases; null: lr.",
    "betas": "Decay of the averages of gradients and of their squares.",
    "eps": "Added to the root of the average square.",
    "weight_decay": "Decay of matrices; norms and biases have none.",
    "lr_pattern": "Learning rates of some parameters: a regex that is found in their names -> lr.",
    "weight_decay_pattern": "Weight decay of some parameters: a regex that is found in their names -> weight_decay.",
    "cautious_weight_decay": "Decay only weights that the update does not move away from zero (arXiv:2510.12402).",
    "momentum": "Decay of the average of gradients.",
    "pooling": "Of which state a text is classified: cls, last or mean; null: cls of an encoder, last of a decoder.",
    "desirable_weight": "Weight of good answers; where they are rarer, give them more.",
    "undesirable_weight": "Weight of bad answers; where they are rarer, give them more.",
    "epsilon": "How far below 1 the ratio of probabilities counts; null: as in the paper of the loss.",
    "epsilon_high": "How far above 1 it counts; null: as in the paper of the loss.",
    "adjust_lr": "match_rms_adamw: lr and weight decay carry over from AdamW; original: as in Jordan's post.",
    "warmup_steps": "Steps in which the rate rises linearly to its highest.",
    "min_lr_ratio": "What the rate falls to, as a share of its highest.",
    "decay_fraction": "Share of the steps, at the end, in which the rate falls.",
}
Tables = dict[str, dict[str, Callable]]  # "choose one" section -> name -> function or dataclass with the options


def list_keys(section: str | None, tables: Tables) -> Iterator[dict[str, str]]:
    """Yield key, type, default and meaning of all keys, or of those below a dotted section.

    >>> next(list_keys("checkpoint.every", {}))
    {'key': 'checkpoint.every', 'type': 'number', 'default': '500', 'meaning': 'Steps between checkpoints.'}
    """
    rows = list(walk(Config, "", tables))
    found = [row for row in rows if not section or row["key"] == section or row["key"].startswith(f"{section}.")]
    if not found:
        names = [row["key"] for row in rows]
        near = did_you_mean(section, [*names, *(name.rpartition(".")[0] for name in names)])
        fix = near or f"one of: {', '.join(dict.fromkeys(name.partition('.')[0] for name in names))}"
        raise UserError("there is no such section", got=section, fix=fix)
    yield from found


def walk(model: type[BaseModel], prefix: str, tables: Tables) -> Iterator[dict[str, str]]:
    """Yield the rows of a section and of the sections in it."""
    for name, field in model.model_fields.items():
        key, inner = f"{prefix}{name}", [one for one in leaves(field.annotation) if inspect.isclass(one)]
        sections = [one for one in inner if issubclass(one, BaseModel)]
        yield make_row(key, field.annotation, field.default, field.description)
        for section in sections:
            if section is Choice:
                yield from choices(key, tables.get(key, {}))
            else:
                item = ".0" if get_origin(field.annotation) is list else ""
                yield from walk(section, f"{key}{item}.", tables)


def choices(section: str, table: dict[str, Callable]) -> Iterator[dict[str, str]]:
    """Yield the rows of the names that a "choose one" section may have, and of their options.

    An option that is the same for several names has one row, which lists them unless it is there for all.
    """
    options: dict[tuple[str, ...], list[str]] = {}
    for name, chosen in table.items():
        text = inspect.getdoc(chosen) or ""
        text = "" if text.startswith(f"{chosen.__name__}(") else text  # what dataclass writes
        yield {"key": f"{section}.name", "type": name, "default": "", "meaning": text.partition("\n\n")[0]}
        hints = typing.get_type_hints(chosen, include_extras=True)
        for parameter in inspect.signature(chosen).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                meaning = re.search(rf"^{parameter.name}  +(\S.*(?:\n {{4,}}.*)*)", text, re.MULTILINE)
                meaning = meaning[1] if meaning else MEANINGS.get(parameter.name)
                default = PydanticUndefined if parameter.default is parameter.empty else parameter.default
                row = make_row(f"{section}.{parameter.name}", hints[parameter.name], default, meaning)
                options.setdefault(tuple(row.values()), []).append(name)
    for values, names in options.items():
        row = dict(zip(("key", "type", "default", "meaning"), values, strict=True))
        yield row if len(names) == len(table) else row | {"key": f"{row['key']} ({', '.join(names)})"}


def make_row(key: str, annotation: Any, default: Any, meaning: str | None) -> dict[str, str]:
    """Return the row of one key, its default as it is written in YAML."""
    if isinstance(default, BaseModel):
        shown = getattr(default, "name", "")
    elif default is PydanticUndefined:
        shown = "required"
    else:
        shown = YAML_WORDS.get(default, str(default)) if isinstance(default, bool | None) else str(default)
    text = " ".join((meaning or "").split())
    return {"key": key, "type": describe(annotation), "default": shown, "meaning": text[:1].upper() + text[1:]}


def leaves(annotation: Any) -> list[Any]:
    """Return the types inside unions, lists and `Annotated`."""
    if get_origin(annotation) is Literal:
        return [annotation]
    if get_origin(annotation) is Annotated:
        return leaves(get_args(annotation)[0])
    inner = [leaf for one in get_args(annotation) for leaf in leaves(one)]
    return inner or [annotation]


def describe(annotation: Any) -> str:
    """Return a type in words.

    >>> describe(int | Literal["auto"] | None), describe(list[str])
    ('number, auto', 'list of text')
    """
    if get_origin(annotation) is Annotated:
        return describe(get_args(annotation)[0])
    if get_origin(annotation) is list:
        return f"list of {describe(get_args(annotation)[0])}"
    if get_origin(annotation) is Literal:
        return ", ".join(
            str(value).lower() if isinstance(value, bool) else str(value) for value in get_args(annotation)
        )
    names = {int: "number", float: "number", str: "text", bool: "true, false"}
    if annotation in names:
        return names[annotation]
    if get_origin(annotation) is dict or inspect.isclass(annotation):
        return "section"
    return ", ".join(dict.fromkeys(describe(one) for one in get_args(annotation) if one is not NoneType))


def json_schema(tables: Tables) -> dict[str, Any]:
    """Return a JSON schema of a config, for editors. Names of "choose one" sections are enumerated."""
    schema = TypeAdapter(Config).json_schema()
    schema["required"] = ["data"]
    corpus = schema["$defs"]["CorpusData"]
    corpus["required"] = ["dir"]  # the default of kind is added before pydantic sees it, and the short form of sources
    sources, text = corpus["properties"]["sources"], {"type": "string"}
    sources["items"] = {"anyOf": [sources["items"], text]}
    corpus["properties"]["sources"] = {"anyOf": [{k: v for k, v in sources.items() if k in ("type", "items")}, text]}
    corpus["properties"]["sources"]["description"] = sources.get("description", "")
    schema["properties"]["data"] = {
        "anyOf": [{"$ref": f"#/$defs/{name}Data"} for name in ("Corpus", "Sft", "Labelled")]
    }
    for section, table in tables.items():
        named = schema["properties"][section]
        named["anyOf"] = [{"type": "object", "properties": {"name": {"enum": list(table)}}}, {"type": "null"}]
        named.pop("$ref", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "llmkit"} | schema
