"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values (Yang et al. 2024, arXiv:2407.10671)."""

from dataclasses import dataclass
from typing import ClassVar

from llmkit.errors import ModelError
from llmkit.models import llama
from llmkit.models.attention import Window
from llmkit.models.family import Family, Gguf


@dataclass(kw_only=True)
class BaseConfig(llama.BaseConfig):
    """Options that Qwen2 and Qwen3 share: the upper layers may have a sliding window."""

    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28  # number of the lowest layers, which have no window

    @property
    def windows(self) -> list[Window]:
        window = self.sliding_window if self.use_sliding_window else None
        return [window if layer >= self.max_window_layers else None for layer in range(self.num_hidden_layers)]


@dataclass(kw_only=True)
class Config(BaseConfig):
    model_type: ClassVar[str] = "qwen2"


OWN_DEFAULTS = {"intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}
HF_DEFAULTS = llama.HF_DEFAULTS | OWN_DEFAULTS


def from_hf(hf: dict) -> dict:
    """Return our options from a config.json; `layer_types` repeats the other fields of windows."""
    options = llama.from_hf(hf)
    types = options.pop("layer_types", None)
    if types is None:
        return options
    layers = options.get("num_hidden_layers", HF_DEFAULTS["num_hidden_layers"])
    lowest = options.get("max_window_layers")
    full = types.count("full_attention") if isinstance(types, list) and len(types) == layers else -1
    if full < 0 or types != ["full_attention"] * full + ["sliding_attention"] * (layers - full):
        return options | {"layer_types": types}  # `read_config` refuses it
    field = "max_window_layers" if options.get("use_sliding_window") else "use_sliding_window"
    without = lowest if field == "max_window_layers" else layers
    if isinstance(without, int) and min(without, layers) != full:
        got = f"{field} {options.get(field)}, and {full} of {layers} layers without a window"
        fix = "correct one of them, or delete it"
        raise ModelError(f"config.json: {field} and layer_types disagree", got=got, fix=fix)
    return options | {"max_window_layers": full}


QWEN = llama.LLAMA | {"from_hf": from_hf, "hf_defaults": HF_DEFAULTS, "may_be_zero": ("max_window_layers",)}
FAMILY = Family(
    **QWEN | {"gguf": Gguf("qwen2", "silu")},
    config=Config,
    build=lambda config: llama.Model(config, llama.Variant(qkv_bias=True)),
    architecture="Qwen2ForCausalLM",
)
