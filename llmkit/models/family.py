"""The contract of a model family: what its file tells the rest of llmkit, in one typed object."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

MAX_LAYERS = 10_000  # a deeper model is a mistake or an attack: even empty layers take memory
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
    """Tell what llama.cpp expects of a family, as read from its loader and converter.

    activation    the hidden_act of llama.cpp's graph; None: the family has no such option
    llama3_rope   its graph has Llama 3's scaling of rotary positions
    unsupported   config -> {what its graph lacks: whether this config has it}
    layout        (config, our name, tensor) -> llama.cpp's tensors, by our names
    """

    architecture: str
    activation: str | None = None
    rms_norm: bool = True
    rope: bool = True
    llama3_rope: bool = False
    unsupported: Callable[[Any], dict[str, bool]] = lambda config: {}
    layout: Callable[[Any, str, Tensor], dict[str, Tensor]] = lambda config, name, tensor: {name: tensor}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family. Its file in models/ fills this in, and FAMILIES lists it.

    config, build     the Config dataclass; config -> the model, on the current device
    problems          further checks of a config's values

    Initialisation (see `layers.init_weights`):
    residual          names of the matrices that write into the residual stream
    init_stds         config -> standard deviations of matrices by name, where the family has its own
    norm_init         what the weights of norms begin as

    Hugging Face's folder:
    architecture      the class name in transformers
    from_hf, to_hf    config.json -> our options, and back
    fixed_values      fields of config.json that change the mathematics, and the only value that is built
    hf_defaults       what transformers assumes where config.json is silent, if our default differs
    ignored_weights   names in weight files that are not read
    may_be_missing    names that files may lack: they are initialised, with a warning
    missing_copies    names that files may lack -> the weight that is copied
    transposed        ends of the names that files store transposed (Conv1D)
    to_disk           (our name, tensor) -> views of it by the names in files; default: as `transposed` says
    from_disk_name    a name in a file -> the name that `to_disk` gives

    What planning, training and adapters ask:
    gated             config -> whether its MLPs have a gate
    experts           config -> (experts of a layer, experts that a token takes)
    decoder_layers    config -> layers of the decoder beside an encoder
    reads_source      parameter name -> whether its matrix is applied to the encoder's tokens, not the decoder's
    start_token_id    config -> the decoder's first token; None: a decoder without an encoder has none
    aux_loss_weight   config -> weight of the auxiliary loss in training
    aux_loss          the model's balance statistics (L, 2, E) -> auxiliary loss
    token_biases      model -> its modules with a bias per token, as (module, name of the bias)
    may_be_zero       integer options that may be 0

    gguf              what llama.cpp expects; None: it is not written as GGUF
    """

    config: type
    build: Callable[[Any], nn.Module]
    architecture: str
    problems: Callable[[Any], Iterable[Problem]] = lambda config: ()

    residual: tuple[str, ...] = ()
    init_stds: Callable[[Any], dict[str, float]] = lambda config: {}
    norm_init: float = 1.0

    from_hf: Callable[[dict], dict] = dict
    to_hf: Callable[[dict], dict] = dict
    fixed_values: dict[str, Any] = field(default_factory=dict)
    hf_defaults: dict[str, Any] = field(default_factory=dict)
    ignored_weights: re.Pattern = NOTHING
    may_be_missing: re.Pattern = NOTHING
    missing_copies: dict[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    to_disk: Callable[[str, Tensor], dict[str, Tensor]] | None = None
    from_disk_name: Callable[[str], str] = lambda name: name

    gated: Callable[[Any], bool] = lambda config: False
    experts: Callable[[Any], tuple[int, int]] = lambda config: (1, 1)
    decoder_layers: Callable[[Any], int] = lambda config: 0
    reads_source: Callable[[str], bool] = lambda name: True
    start_token_id: Callable[[Any], int | None] = lambda config: None
    aux_loss_weight: Callable[[Any], float] = lambda config: 0.0
    aux_loss: Callable[[Tensor], Tensor] | None = None
    token_biases: Callable[[nn.Module], list[tuple[nn.Module, str]]] = lambda model: []
    may_be_zero: tuple[str, ...] = ()

    gguf: Gguf | None = None

    def disk_views(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return views of a parameter by their names in weight files."""
        if self.to_disk:
            return self.to_disk(name, tensor)
        return {name: tensor.T if name.endswith(self.transposed) else tensor}


def shape_problems(family: Family, config: Config) -> list[Problem]:
    """Return every value of a config that can't be built; [] if the shapes fit."""
    found = []
    for key, value in asdict(config).items():
        least = int(key not in family.may_be_zero)
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            found.append((key, f"is {value}, but must be at least {least}"))
        if isinstance(value, float) and (value < 0 or ("drop" in key and value >= 1)):
            found.append((key, f"is {value}, but must be {'in [0, 1)' if 'drop' in key else 'positive'}"))
    layers = {"num_hidden_layers": config.num_hidden_layers, "num_decoder_layers": family.decoder_layers(config)}
    found += [(key, f"is {value}, over {MAX_LAYERS}") for key, value in layers.items() if value > MAX_LAYERS]
    return found or [*head_problems(config), *family.problems(config)]


def head_problems(config: Config) -> Iterator[Problem]:
    """Yield what does not fit among the numbers of heads and the width."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.hidden_size % heads and config.head_dim == config.hidden_size // heads:
        yield "hidden_size", f"is {config.hidden_size}, which {heads} heads do not divide"
    if heads % kv_heads:
        yield "num_key_value_heads", f"is {kv_heads}, which does not divide {heads} heads"
