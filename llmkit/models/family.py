"""The contract of a model family: what its file tells the rest of llmkit, in one typed object."""

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from llmkit.errors import ModelError

# More than any published model has: a larger value is a mistake or an attack. Within these limits a model without
# weights is built in seconds, and no tensor has 2^63 elements.
MOST_BY_FIELD = {
    **dict.fromkeys(("num_hidden_layers", "num_decoder_layers"), 1000),  # DeepNet: 1,000 (arXiv:2203.00555)
    "hidden_size": 2**17,  # Megatron-Turing NLG: 20,480
    "intermediate_size": 2**20,  # PaLM: 73,728
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 2**12),  # Llama 3.1: 128; Gemma: 256
    "num_local_experts": 2**12,  # Switch-C: 2,048
}
MOST = 2**24  # of other integers: Llama 4 Scout has 10,485,760 positions, XLM-V a million tokens
NOTHING = re.compile(r"(?!)")  # matches no name
Problem = tuple[str, str]  # a key of a Config, and what is wrong with its value


class Config(Protocol):
    """The fields and properties that every family's Config dataclass has, under the names of the YAML.

    kind     causal: a decoder; masked: an encoder; seq2seq: an encoder and a decoder
    init     scheme of `layers.init_weights`
    windows  keys that a query may see, by layer (of the decoder); None: all
    """

    model_type: ClassVar[str]
    kind: ClassVar[Literal["causal", "masked", "seq2seq"]]
    vocab_size: int | None  # None: the tokenizer's
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float
    init: str
    windows: list[int | None]


@dataclass(frozen=True)
class Gguf:
    """Describe a family to llama.cpp: names and features that its loader and converter expect."""

    architecture: str
    activation: str | None = None  # the hidden_act of its graph; None: the family has no such option
    rms_norm: bool = True
    rope: bool = True
    llama3_rope: bool = False  # its graph has Llama 3's scaling of rotary positions
    # config -> {what its graph lacks: whether this config has it}
    unsupported: Callable[[Any], dict[str, bool]] = lambda config: {}
    # (config, our name, tensor) -> llama.cpp's tensors, by our names
    layout: Callable[[Any, str, Tensor], dict[str, Tensor]] = lambda config, name, tensor: {name: tensor}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family. Its file in models/ fills this in, and FAMILIES lists it."""

    config: type  # the Config dataclass
    build: Callable[[Any], nn.Module]  # config -> the model, on the current device
    problems: Callable[[Any], Iterable[Problem]] = lambda config: ()  # further checks of a config's values
    may_be_zero: tuple[str, ...] = ()  # integer options that may be 0

    # Initialisation, see `layers.init_weights`:
    residual: tuple[str, ...] = ()  # names of the matrices that write into the residual stream
    init_stds: Callable[[Any], dict[str, float]] = lambda config: {}  # the family's own standard deviations, by name
    norm_init: float = 1.0  # of the weights of norms

    # Hugging Face's folder:
    architecture: str  # the class name in transformers
    from_hf: Callable[[dict], dict] = dict  # config.json -> our options; raises ModelError if fields disagree
    to_hf: Callable[[dict], dict] = dict
    fixed_values: dict[str, Any] = field(default_factory=dict)  # field -> the only value that is supported
    hf_defaults: dict[str, Any] = field(default_factory=dict)  # what transformers assumes, where ours differs
    ignored_weights: re.Pattern = NOTHING  # names in weight files that are not read
    may_be_missing: re.Pattern = NOTHING  # names that files may lack: they are initialised, with a warning
    missing_copies: dict[str, str] = field(default_factory=dict)  # names that files may lack -> the weight to copy
    transposed: tuple[str, ...] = ()  # ends of the names that files store transposed (Conv1D)
    to_disk: Callable[[str, Tensor], dict[str, Tensor]] | None = None  # None: as `transposed` says, see `disk_views`
    from_disk_name: Callable[[str], str] = lambda name: (
        name
    )  # an old name in a file -> the name that `disk_views` gives
    # Its head for labels, see `heads.add_head`: name, and whether it has a bias
    text_head: tuple[str, bool] = ("score", False)
    tag_head: tuple[str, bool] = ("score", True)
    pooler: str = ""  # name of a linear between the first token's state and the head
    token_heads: tuple[str, ...] = ("lm_head",)  # modules that predict tokens
    prefix: str = ""  # of the names of all weights but the head's; files of a model without its head lack it

    # What planning, training and adapters ask:
    # ends of the names of the linears in a block that give keys and values, and that write into the residual stream
    keys_values: tuple[str, ...] = ("k_proj", "v_proj")
    writers: tuple[str, ...] = ("o_proj", "down_proj")
    gated: Callable[[Any], bool] = lambda config: False  # whether its MLPs have a gate
    # config -> the experts of a layer, and how many a token takes; None: no mixture of experts
    experts: Callable[[Any], tuple[int, int] | None] = lambda config: None
    decoder_layers: Callable[[Any], int] = lambda config: 0  # of the decoder beside an encoder
    reads_source: Callable[[str], bool] = lambda name: True  # name -> whether the parameter reads encoder tokens
    start_token_id: Callable[[Any], int | None] = lambda config: None  # the first token of a decoder beside an encoder
    aux_loss_weight: Callable[[Any], float] = lambda config: 0.0
    aux_loss: Callable[[Tensor], Tensor] | None = None  # the model's balance statistics (L, 2, E) -> auxiliary loss
    token_biases: Callable[[nn.Module], list[tuple[nn.Module, str]]] = lambda model: []  # of its tokens: module, name

    gguf: Gguf | None = None  # None: it is not written as GGUF

    def disk_views(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return views of a parameter by their names in weight files."""
        if self.to_disk:
            return self.to_disk(name, tensor)
        return {name: tensor.T if name.endswith(self.transposed) else tensor}


def unite(fields: Iterable[tuple[str, str, Any]]) -> dict[str, Any]:
    """Return the fields of a config.json under our names; raise a ModelError if two spellings of one disagree.

    fields  (spelling, our name, value); null says nothing

    >>> unite([("n_embd", "hidden_size", 8), ("hidden_size", "hidden_size", None)])
    {'hidden_size': 8}
    """
    found: dict[str, Any] = {}
    first: dict[str, str] = {}  # our name -> the spelling that gave the value
    for spelling, name, value in fields:
        if found.get(name) is None:
            found[name], first[name] = value, spelling
        elif value is not None and value != found[name]:
            what, got = f"config.json: {first[name]} and {spelling} disagree", f"{found[name]} and {value}"
            raise ModelError(what, got=got, fix="correct one of them, or delete it")
    return found


def rename(hf: dict, names: dict[str, str]) -> dict[str, Any]:
    """Return the fields of a config.json under our names: `unite` with names (another spelling -> our name)."""
    return unite((key, names.get(key, key), value) for key, value in hf.items())


def shape_problems(family: Family, config: Config) -> list[Problem]:
    """Return every value of a config that can't be built; [] if the shapes fit."""
    found = []
    for key, value in asdict(config).items():
        least, most = int(key not in family.may_be_zero), MOST_BY_FIELD.get(key, MOST)
        if isinstance(value, int) and not isinstance(value, bool) and not least <= value <= most:
            found.append((key, f"is {reprlib.repr(value)}, but must be from {least} to {most}"))
        if isinstance(value, float):
            below = 1 if "drop" in key else math.inf
            if not (0 <= value < below and (value or "_eps" not in key)):
                found.append((key, f"is {value}, but must be {'in [0, 1)' if below == 1 else 'positive'}"))
    given = [(key, reason) for key, reason in found if not is_derived(config, key)]
    return given or found or [*head_problems(config), *family.problems(config)]


def is_derived(config: Config, key: str) -> bool:
    """Return whether an option has the value that its Config derives from others if it is left out."""
    value, default = getattr(config, key), type(config).__dataclass_fields__[key].default
    return default is None and getattr(replace(config, **{key: None}), key) == value


def head_problems(config: Config) -> Iterator[Problem]:
    """Yield what does not fit among the numbers of heads and the width."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.hidden_size % heads and config.head_dim == config.hidden_size // heads:
        yield "hidden_size", f"is {config.hidden_size}, which {heads} heads do not divide"
    if heads % kv_heads:
        yield "num_key_value_heads", f"is {kv_heads}, which does not divide {heads} heads"
