"""Config: every size of PaliGemma, in dataclasses read from a config.json.

Built in notebooks/01_config.ipynb: edit it there, then run `make export`.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, ClassVar, Self, get_args, get_origin

# Far beyond any model, and still neither out of memory nor slow to build.
_MOST, _MOST_LAYERS = 10_000_000, 500


def _require(fits: bool, name: str, value: Any, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name}={short_repr(value)}, expected {expected}")


class _Config:
    """What the dataclasses share: the checks, and how a part of a file is read."""

    activations: ClassVar = ("gelu_pytorch_tanh",)
    multiples: ClassVar = ()  # pairs of fields: the first is a multiple of the second

    def __post_init__(self) -> None:
        """Raise ValueError for a field whose value isn't what its type asks for.

        Floats are positive; whole numbers too, but token ids and layers begin at 0.
        """
        for f in fields(self):
            value = getattr(self, f.name)
            kinds = [get_origin(kind) or kind for kind in get_args(f.type) or (f.type,)]
            if value is None and type(None) in kinds:
                continue
            if int in kinds:
                least = 0 if "_token_" in f.name or "layers" in f.name else 1
                most = _MOST_LAYERS if "layers" in f.name else _MOST
                fits = type(value) is int and least <= value <= most  # no bool
                expected = f"a whole number from {least} to {most:,}"
            elif float in kinds:
                fits = type(value) in (int, float) and 0 < value < 1e12  # no NaN
                expected = "a positive number"
            elif str in kinds:
                fits, expected = value == f.default, repr(f.default)
            else:
                fits = isinstance(value, tuple(kinds))
                expected = " or ".join(kind.__name__ for kind in kinds)
            _require(fits, f"{type(self).__name__}: {f.name}", value, expected)
        for whole, part in self.multiples:
            a, b = getattr(self, whole), getattr(self, part)
            _require(a % b == 0, whole, a, f"a multiple of {part}={b}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a part of a config.json; unknown keys are ignored.

        null means the default, but where None is among a field's own values it means
        that. Raises ValueError for another model, activation function or kind of RoPE.
        """
        for key in ("hidden_activation", "hidden_act"):
            value, known = values.get(key), " or ".join(map(repr, cls.activations))
            _require(value in (None, *cls.activations), key, value, known)
        nullable = {f.name: type(None) in get_args(f.type) for f in fields(cls)}
        known = {n: value for n, value in values.items() if n in nullable}
        return cls(**{n: v for n, v in known.items() if v is not None or nullable[n]})


@dataclass
class SiglipVisionConfig(_Config):
    """Sizes of the SigLIP image encoder; the defaults are So400m/14 at 224 px.

    Raises ValueError for a value that can't be, and where sizes contradict each other.
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
    num_image_tokens: int | None = None  # (image_size / patch_size)², if absent
    model_type: str = "siglip_vision_model"

    multiples = (("image_size", "patch_size"), ("hidden_size", "num_attention_heads"))

    def __post_init__(self) -> None:
        super().__post_init__()
        side, patch, given = self.image_size, self.patch_size, self.num_image_tokens
        tokens = (side // patch) ** 2
        _require(tokens <= _MOST, "image_size", side, f"at most {_MOST:,} patches")
        expected = f"{tokens}: {side} px in patches of {patch} px"
        _require(given in (None, tokens), "num_image_tokens", given, expected)
        self.num_image_tokens = tokens

    @property
    def head_dim(self) -> int:
        """Width of one attention head: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads


@dataclass
class GemmaConfig(_Config):
    """Sizes of the Gemma decoder; the defaults are those of PaliGemma 3B's Gemma 2B.

    Raises ValueError for sizes that can't be. Source: Gemma Team 2024.
    """

    vocab_size: int = 257216
    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256  # not always hidden_size / num_attention_heads
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    pad_token_id: int = 0
    model_type: str = "gemma"

    # Older files say "gelu" and mean the tanh approximation: Gemma has no other.
    activations = ("gelu_pytorch_tanh", "gelu")
    multiples = (("num_attention_heads", "num_key_value_heads"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        pad, rows, width = self.pad_token_id, self.vocab_size, self.head_dim
        _require(width % 2 == 0, "head_dim", width, "an even number: RoPE has pairs")
        _require(pad < rows, "pad_token_id", pad, f"less than vocab_size={rows}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a `text_config`; transformers 5 nests RoPE's base deeper."""
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        _require(isinstance(rope, dict), "rope_parameters", rope, "a dict")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        _require(kind == "default", "rope_type", kind, "'default'")
        theta = rope.get("rope_theta", values.get("rope_theta"))
        return super().from_dict(values | {"rope_theta": theta})


@dataclass
class Gemma2Config(GemmaConfig):
    """Sizes of PaliGemma 2's decoder; the defaults are those of its 3B model.

    Raises ValueError for a value that can't be, and where sizes contradict each other.
    Source: Gemma Team 2024 (Gemma 2), Steiner et al. 2024 (PaliGemma 2).
    """

    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_key_value_heads: int = 4
    query_pre_attn_scalar: int = 256  # scores are divided by its square root
    attn_logit_softcapping: float | None = 50.0  # bound of the scores; None: no bound
    final_logit_softcapping: float | None = 30.0  # bound of the logits
    sliding_window: int | None = 4096  # tokens that a layer with a window attends to
    layer_types: list[str] | None = None  # if absent, every other one has a window
    model_type: str = "gemma2"

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds, layers = ("sliding_attention", "full_attention"), self.num_hidden_layers
        if self.layer_types is None:
            self.layer_types = [kinds[i % 2] for i in range(layers)]
        known = all(kind in kinds for kind in self.layer_types)
        fits = known and len(self.layer_types) == layers
        _require(fits, "layer_types", self.layer_types, f"{layers} of {kinds}")


@dataclass
class PaliGemmaConfig(_Config):
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
        super().__post_init__()
        if isinstance(self.vision_config, dict):
            self.vision_config = SiglipVisionConfig.from_dict(self.vision_config)
        if isinstance(self.text_config, dict):
            is_gemma2 = self.text_config.get("model_type") == Gemma2Config.model_type
            text_class = Gemma2Config if is_gemma2 else GemmaConfig
            self.text_config = text_class.from_dict(self.text_config)
        width, rows = self.text_config.hidden_size, self.text_config.vocab_size
        joint, pad = self.projection_dim, self.pad_token_id
        expected = f"the text model's hidden_size={width}"
        _require(joint == width, "projection_dim", joint, expected)
        _require(pad < rows, "pad_token_id", pad, f"less than vocab_size={rows}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a config.json; transformers 5 writes `image_token_id`."""
        index = values.get("image_token_index", values.get("image_token_id"))
        packed = values.get("quantization_config")
        _require(packed is None, "quantization_config", packed, "the original weights")
        return super().from_dict(values | {"image_token_index": index})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read `folder/config.json`; raises OSError, or ValueError for another file."""
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            named = isinstance(values, dict) and bool(values.get("model_type"))
            _require(named, "model_type", None, "'paligemma'")
            return cls.from_dict(values)
        except (ValueError, RecursionError) as error:
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
