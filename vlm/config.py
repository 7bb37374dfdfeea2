"""Every size of PaliGemma in a few small dataclasses, read from a real config.json.

Built in notebooks/01_config.ipynb: edit it there, then run `make export`.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, get_args, get_origin

__all__ = ["SiglipVisionConfig", "GemmaConfig", "Gemma2Config", "PaliGemmaConfig"]

# Far beyond any model, and small enough that nothing is out of time or memory yet.
_MOST = {"num_hidden_layers": 1000, "image_size": 20_000}  # 10,000,000 of all else


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


def _require_one_of(what: str, value: Any, expected: tuple[Any, ...]) -> None:
    """Raise ValueError unless `value` is one of `expected`; None counts as absent."""
    names = " or ".join(repr(name) for name in expected)
    message = f"{what} {short_repr(value)} is not supported; expected {names}"
    _require(value is None or value in expected, message)


def _first_given(values: dict[str, Any], *names: str) -> Any:
    """The first of these entries that is neither absent nor null; else None."""
    return next((values[n] for n in names if values.get(n) is not None), None)


def _known_fields(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of `values` that `cls` has a field for; ValueError for another model.

    null means the default, but where None is among a field's own values it means that.
    """
    kind = values.get("model_type")
    _require_one_of(f"{cls.__name__}: model_type", kind, (cls.model_type,))
    types = {f.name: get_args(f.type) for f in fields(cls)}
    return {
        name: value
        for name, value in values.items()
        if name in types and (value is not None or type(None) in types[name])
    }


def _check_fields(config: Any) -> None:
    """Raise ValueError, by name, for a field whose value isn't what its type asks for.

    Floats are positive; whole numbers too, but token ids and layers count from 0 on.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        kinds = [get_origin(kind) or kind for kind in get_args(f.type) or (f.type,)]
        if int in kinds:
            least = 0 if "_token_" in f.name or "layers" in f.name else 1
            most = _MOST.get(f.name, 10_000_000)
            fits = type(value) is int and least <= value <= most  # a bool isn't one
            expected = f"a whole number from {least} to {most:,}"
        elif float in kinds:
            fits = type(value) in (int, float) and 0 < value < 1e12  # not NaN either
            expected = "a positive number"
        elif str in kinds:
            fits, expected = value == f.default, repr(f.default)
        else:
            fits = isinstance(value, tuple(kinds))
            expected = " or ".join(kind.__name__ for kind in kinds)
            expected = expected.replace("NoneType", "None")
        _require(
            fits or (value is None and type(None) in kinds),
            f"{type(config).__name__}: {f.name}={short_repr(value)}, "
            f"expected {expected}",
        )


@dataclass
class SiglipVisionConfig:
    """Sizes of the SigLIP image encoder; the defaults are So400m/14 at 224 px.

    `num_image_tokens` is (image_size / patch_size)², derived when absent. Raises
    ValueError for a value that can't be, and where sizes contradict each other.
    Source: Zhai et al. 2023 (SigLIP), Alabdulmohsin et al. 2023 (So400m).
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    num_image_tokens: int | None = None
    model_type: str = "siglip_vision_model"

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(
            self.image_size % self.patch_size == 0,
            f"image_size={self.image_size} must be a multiple of "
            f"patch_size={self.patch_size}",
        )
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size={self.hidden_size} must be a multiple of "
            f"num_attention_heads={self.num_attention_heads}",
        )
        derived = (self.image_size // self.patch_size) ** 2
        _require(
            self.num_image_tokens in (None, derived),
            f"num_image_tokens={self.num_image_tokens}, but a picture of "
            f"{self.image_size} px in patches of {self.patch_size} px makes {derived}",
        )
        self.num_image_tokens = derived

    @property
    def head_dim(self) -> int:
        """Width of one attention head: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SiglipVisionConfig":
        """Build from a config.json's `vision_config`; unknown keys are ignored.

        Raises ValueError for another kind of model or another activation.
        """
        known = _known_fields(cls, values)
        act = values.get("hidden_act")
        _require_one_of("SiglipVisionConfig: hidden_act", act, ("gelu_pytorch_tanh",))
        return cls(**known)


@dataclass
class GemmaConfig:
    """Sizes of the Gemma decoder; the defaults are those of PaliGemma 3B's Gemma 2B.

    `head_dim` stands on its own: it need not be hidden_size / num_attention_heads.
    Raises ValueError for a value that can't be, and where sizes contradict each other.
    Source: Gemma Team 2024.
    """

    vocab_size: int = 257216
    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    pad_token_id: int = 0
    model_type: str = "gemma"

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads={self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={self.num_key_value_heads}",
        )
        _require(
            self.head_dim % 2 == 0,
            f"head_dim={self.head_dim} must be even: RoPE rotates pairs of dimensions",
        )
        _require(
            self.pad_token_id < self.vocab_size,
            f"pad_token_id={self.pad_token_id} must be below "
            f"vocab_size={self.vocab_size}",
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GemmaConfig":
        """Build from a config.json's `text_config`; unknown keys are ignored.

        Raises ValueError for another kind of model, activation or RoPE.
        """
        known = _known_fields(cls, values)
        # Older files say "gelu" and mean the tanh approximation: Gemma has no other.
        act = _first_given(values, "hidden_activation", "hidden_act")
        expected = ("gelu_pytorch_tanh", "gelu")
        _require_one_of(f"{cls.__name__}: hidden_activation", act, expected)
        # transformers 5 keeps the base of RoPE one level down.
        rope = _first_given(values, "rope_parameters", "rope_scaling")
        rope = {} if rope is None else rope
        _require(
            isinstance(rope, dict),
            f"{cls.__name__}: rope_parameters={short_repr(rope)}, expected dict",
        )
        kind = _first_given(rope, "rope_type", "type")
        _require_one_of(f"{cls.__name__}: rope_type", kind, ("default",))
        if rope.get("rope_theta") is not None:
            known.setdefault("rope_theta", rope["rope_theta"])
        return cls(**known)


@dataclass
class Gemma2Config(GemmaConfig):
    """Sizes of PaliGemma 2's decoder; the defaults are those of its 3B model.

    - `query_pre_attn_scalar`: attention scores are divided by its square root.
    - `attn_logit_softcapping`, `final_logit_softcapping`: bounds of the scores and of
      the logits; None: unbounded.
    - `sliding_window`: how many tokens a layer with a window sees; None: no windows.
    - `layer_types`: "sliding_attention" or "full_attention" for each layer; every
      other one when absent, and the first layer has a window.

    Raises ValueError for a value that can't be, and where sizes contradict each other.
    Source: Gemma Team 2024 (Gemma 2), Steiner et al. 2024 (PaliGemma 2).
    """

    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_key_value_heads: int = 4
    query_pre_attn_scalar: int = 256
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    model_type: str = "gemma2"

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("sliding_attention", "full_attention")
        if self.layer_types is None:
            self.layer_types = [kinds[i % 2] for i in range(self.num_hidden_layers)]
        for kind in self.layer_types:  # None too is another one
            _require_one_of("layer_types:", str(kind), kinds)
        _require(
            len(self.layer_types) == self.num_hidden_layers,
            f"{len(self.layer_types)} layer_types for num_hidden_layers="
            f"{self.num_hidden_layers}: give one for each layer, or none",
        )


@dataclass
class PaliGemmaConfig:
    """The whole model: image encoder, decoder, the width they meet at, special ids.

    `vision_config` and `text_config` may be dicts, as in a config.json, or config
    objects. Every default is the real 3B model's at 224 px. `image_token_index` may lie
    outside the embedding's rows: that id is replaced before the lookup.
    Raises ValueError for a value that can't be, and where the parts don't fit together.
    Source: Beyer et al. 2024 (PaliGemma).
    """

    vision_config: SiglipVisionConfig | dict[str, Any] = field(
        default_factory=SiglipVisionConfig
    )
    text_config: GemmaConfig | dict[str, Any] = field(default_factory=GemmaConfig)
    projection_dim: int = 2048
    image_token_index: int = 257152
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int = 1
    model_type: str = "paligemma"

    def __post_init__(self) -> None:
        _check_fields(self)
        if isinstance(self.vision_config, dict):
            self.vision_config = SiglipVisionConfig.from_dict(self.vision_config)
        if isinstance(self.text_config, dict):
            kind = self.text_config.get("model_type")
            _require_one_of("text_config: model_type", kind, ("gemma", "gemma2"))
            text_class = Gemma2Config if kind == "gemma2" else GemmaConfig
            self.text_config = text_class.from_dict(self.text_config)
        width, rows = self.text_config.hidden_size, self.text_config.vocab_size
        _require(
            self.projection_dim == width,
            f"projection_dim={self.projection_dim} must equal the text model's "
            f"hidden_size={width}: image features join its stream",
        )
        _require(
            self.pad_token_id < rows,
            f"pad_token_id={self.pad_token_id} must be below vocab_size={rows}",
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PaliGemmaConfig":
        """Build from a config.json's contents, as its parts do from theirs."""
        # transformers 5 has another name for the same number.
        index = _first_given(values, "image_token_index", "image_token_id")
        return cls(**_known_fields(cls, values | {"image_token_index": index}))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "PaliGemmaConfig":
        """Read `folder/config.json`.

        Raises FileNotFoundError where there is none, ValueError where it is not a
        PaliGemma's.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no config.json in {Path(folder)}: give the folder that holds it"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict) or values.get("model_type") is None:
            raise ValueError(f"{path} says no model_type: expected 'paligemma'")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json, which transformers reads too."""
        values = asdict(self)
        values["architectures"] = ["PaliGemmaForConditionalGeneration"]
        values["hidden_size"] = self.text_config.hidden_size
        values["vision_config"]["projection_dim"] = self.projection_dim
        values["vision_config"]["vision_use_head"] = False
        values["text_config"]["hidden_activation"] = "gelu_pytorch_tanh"
        values["text_config"]["num_image_tokens"] = self.vision_config.num_image_tokens
        return values

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder/config.json`; makes the folder where there is none."""
        path = Path(folder) / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
