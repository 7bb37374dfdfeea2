"""Every size of PaliGemma in a few small dataclasses, read from a real config.json.

Built in notebooks/01_config.ipynb: edit it there, then run `make export`.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

__all__ = ["SiglipVisionConfig", "GemmaConfig", "Gemma2Config", "PaliGemmaConfig"]


def _known_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The entries of `values` that `cls` has a field for.

    null means the default, but where None is among a field's own values it means that.
    """
    types = {f.name: get_args(f.type) for f in fields(cls)}
    return {
        name: value
        for name, value in values.items()
        if name in types and (value is not None or type(None) in types[name])
    }


def _require_multiple(**sizes: int) -> None:
    """Raise ValueError unless the first size is a positive multiple of the second."""
    (name, size), (unit_name, unit) = sizes.items()
    are_ints = isinstance(size, int) and isinstance(unit, int)
    if not are_ints or size <= 0 or unit <= 0 or size % unit:
        raise ValueError(
            f"{name}={size} must be a positive multiple of {unit_name}={unit}"
        )


def _require_one_of(what: str, value: Any, expected: tuple[Any, ...]) -> None:
    """Raise ValueError unless `value` is one of `expected`; None counts as absent."""
    if value is not None and value not in expected:
        names = " or ".join(repr(name) for name in expected)
        raise ValueError(f"{what} {value!r} is not supported; expected {names}")


@dataclass
class SiglipVisionConfig:
    """Sizes of the SigLIP image encoder; the defaults are So400m/14 at 224 px.

    `num_image_tokens` is (image_size / patch_size)², derived when absent. Raises
    ValueError where sizes contradict each other.
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
        _require_multiple(image_size=self.image_size, patch_size=self.patch_size)
        _require_multiple(
            hidden_size=self.hidden_size, num_attention_heads=self.num_attention_heads
        )
        derived = (self.image_size // self.patch_size) ** 2
        if self.num_image_tokens is None:
            self.num_image_tokens = derived
        elif self.num_image_tokens != derived:
            raise ValueError(
                f"num_image_tokens={self.num_image_tokens}, but a picture of "
                f"{self.image_size} px in patches of {self.patch_size} px makes "
                f"{derived}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SiglipVisionConfig":
        """Build from a config.json's `vision_config`; unknown keys are ignored.

        Raises ValueError for another kind of model or another activation.
        """
        _require_one_of(
            "vision model_type", values.get("model_type"), ("siglip_vision_model",)
        )
        _require_one_of(
            "vision hidden_act", values.get("hidden_act"), ("gelu_pytorch_tanh",)
        )
        return cls(**_known_fields(cls, values))


@dataclass
class GemmaConfig:
    """Sizes of the Gemma decoder; the defaults are those of PaliGemma 3B's Gemma 2B.

    `head_dim` stands on its own: it need not be hidden_size / num_attention_heads.
    Raises ValueError where sizes contradict each other.
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
        _require_multiple(
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
        )
        if self.head_dim <= 0 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be positive and even: "
                "RoPE rotates pairs of dimensions"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GemmaConfig":
        """Build from a config.json's `text_config`; unknown keys are ignored.

        Raises ValueError for another kind of model, activation or RoPE.
        """
        _require_one_of("text model_type", values.get("model_type"), (cls.model_type,))
        # Older files say "gelu" and mean the tanh approximation: Gemma has no other.
        _require_one_of(
            "text activation",
            values.get("hidden_activation") or values.get("hidden_act"),
            ("gelu_pytorch_tanh", "gelu"),
        )
        # transformers 5 keeps the base of RoPE one level down.
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type")
        _require_one_of("rope_type", kind, ("default",))
        theta = values.get("rope_theta") or rope.get("rope_theta")
        return cls(**_known_fields(cls, values | {"rope_theta": theta}))


@dataclass
class Gemma2Config(GemmaConfig):
    """Sizes of PaliGemma 2's decoder; the defaults are those of its 3B model.

    - `query_pre_attn_scalar`: attention scores are divided by its square root.
    - `attn_logit_softcapping`, `final_logit_softcapping`: bounds of the scores and of
      the logits; None: unbounded.
    - `sliding_window`: how many tokens a layer with a window sees; None: no windows.
    - `layer_types`: "sliding_attention" or "full_attention" for each layer; every
      other one when absent, and the first layer has a window.

    Raises ValueError where sizes contradict each other.
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
        for name in (
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "sliding_window",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive")
        kinds = ("sliding_attention", "full_attention")
        if self.layer_types is None:
            self.layer_types = [kinds[i % 2] for i in range(self.num_hidden_layers)]
        for kind in self.layer_types:  # None too is another one
            _require_one_of("layer type", str(kind), kinds)
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"{len(self.layer_types)} layer_types for num_hidden_layers="
                f"{self.num_hidden_layers}: give one for each layer, or none"
            )


@dataclass
class PaliGemmaConfig:
    """The whole model: image encoder, decoder, the width they meet at, special ids.

    `vision_config` and `text_config` may be dicts, as in a config.json, or config
    objects. Every default is the real 3B model's at 224 px. `image_token_index` may lie
    outside the embedding's rows: that id is replaced before the lookup.
    Raises ValueError where the parts don't fit together.
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
        if isinstance(self.vision_config, dict):
            self.vision_config = SiglipVisionConfig.from_dict(self.vision_config)
        if isinstance(self.text_config, dict):
            kind = self.text_config.get("model_type")
            _require_one_of("text model_type", kind, ("gemma", "gemma2"))
            text_class = Gemma2Config if kind == "gemma2" else GemmaConfig
            self.text_config = text_class.from_dict(self.text_config)
        if self.projection_dim != self.text_config.hidden_size:
            raise ValueError(
                f"projection_dim={self.projection_dim} must equal the text model's "
                f"hidden_size={self.text_config.hidden_size}: image features join its "
                "stream"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PaliGemmaConfig":
        """Build from the contents of a config.json; unknown keys are ignored.

        Raises ValueError for another kind of model.
        """
        _require_one_of("model_type", values.get("model_type"), ("paligemma",))
        index = values.get("image_token_index")
        if index is None:  # transformers 5 calls the same number image_token_id
            index = values.get("image_token_id")
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
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict) or values.get("model_type") is None:
            raise ValueError(f"{path} says no model_type: expected 'paligemma'")
        return cls.from_dict(values)

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
