"""The dataclasses: the real file, what they refuse, to disk and back."""

import json
import math
from dataclasses import fields
from pathlib import Path

import jaxtyping
import pytest
import torch
import transformers

import vlm
from vlm.config import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    SiglipVisionConfig,
)

REAL = Path(vlm.__file__).parent / "assets" / "configs" / "paligemma-3b-pt-224.json"


def real() -> dict:
    return json.loads(REAL.read_text(encoding="utf-8"))


def small(**changes) -> PaliGemmaConfig:
    """A config whose every field differs from the default where it may."""
    values = dict(
        vision_config=dict(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_channels=1,
            image_size=56,
            patch_size=8,
            layer_norm_eps=1e-5,
        ),
        text_config=dict(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_theta=500.0,
            pad_token_id=3,
        ),
        projection_dim=32,
        image_token_index=120,
        pad_token_id=3,
        bos_token_id=4,
        eos_token_id=5,
    )
    return PaliGemmaConfig(**values | changes)


# A PaliGemma 2 file's entries as hub files have them: what is absent is the default.
PALIGEMMA_2 = {
    "model_type": "paligemma",
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "projection_dim": 4608,
    "image_token_index": 257152,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "text_config": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 107],
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
        "sliding_window": 4096,
        "vocab_size": 257216,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 448,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 1024,
        "patch_size": 14,
        "vision_use_head": False,
    },
}


def gemma2(**changes) -> PaliGemmaConfig:
    text = PALIGEMMA_2["text_config"] | changes
    return PaliGemmaConfig.from_dict(PALIGEMMA_2 | {"text_config": text})


def test_a_paligemma_2_file_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PALIGEMMA_2))
    config = PaliGemmaConfig.from_pretrained(tmp_path)
    text = config.text_config
    assert isinstance(text, Gemma2Config) and config.projection_dim == 4608
    assert (text.head_dim, text.query_pre_attn_scalar) == (128, 144)
    assert text.layer_types == ["sliding_attention", "full_attention"] * 23
    assert text.max_position_embeddings == 8192 and text.rope_theta == 10000.0
    assert config.vision_config.num_image_tokens == 1024


def test_what_a_paligemma_2_file_leaves_out_is_the_3b_models():
    """As transformers has it, but for the vocabulary: PaliGemma's has more rows."""
    config = PaliGemmaConfig.from_dict(
        {"text_config": {"model_type": "gemma2"}, "projection_dim": 2304}
    )
    theirs = transformers.Gemma2Config()
    for name, value in vars(config.text_config).items():
        if name == "rope_theta":
            assert theirs.rope_parameters["rope_theta"] == value
        elif name != "vocab_size":
            assert getattr(theirs, name) == value, name


@pytest.mark.parametrize(
    "name", ["attn_logit_softcapping", "final_logit_softcapping", "sliding_window"]
)
def test_null_switches_caps_and_windows_off(name):
    config = gemma2(**{name: None})
    assert getattr(config.text_config, name) is None
    assert PaliGemmaConfig.from_dict(config.to_dict()) == config
    others = gemma2(hidden_activation=None, layer_types=None, head_dim=None)
    assert others.text_config.head_dim == 256
    assert len(others.text_config.layer_types) == 46


def test_transformers_and_we_read_each_others_paligemma_2():
    kinds = ["full_attention", "sliding_attention"] * 23
    ours = gemma2(layer_types=kinds, rope_theta=500.0, sliding_window=7)
    theirs = transformers.PaliGemmaConfig.from_dict(ours.to_dict())
    for name, value in vars(ours.text_config).items():
        if name == "rope_theta":
            assert theirs.text_config.rope_parameters["rope_theta"] == value
        else:
            assert getattr(theirs.text_config, name) == value, name
    assert PaliGemmaConfig.from_dict(theirs.to_dict()) == ours


def test_defaults_are_the_real_model():
    assert PaliGemmaConfig.from_dict(real()) == PaliGemmaConfig()


def test_real_model_has_its_published_size():
    from vlm.paligemma import PaliGemmaForConditionalGeneration

    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(real()))
    sizes = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in model.named_children()
    }
    assert sizes == {
        "vision_tower": 412_442_352,
        "multi_modal_projector": 2_361_344,
        "language_model": 2_508_662_784,
    }


@pytest.mark.parametrize(
    ("image_size", "patch_size", "tokens"),
    [(224, 14, 256), (448, 14, 1024), (896, 14, 4096), (224, 16, 196), (112, 14, 64)],
)
def test_image_tokens_are_derived(image_size, patch_size, tokens):
    config = SiglipVisionConfig(image_size=image_size, patch_size=patch_size)
    assert config.num_image_tokens == tokens


def test_head_dim_of_each_part():
    assert SiglipVisionConfig().head_dim == 72
    # Gemma's stands alone: here it isn't hidden_size / num_attention_heads.
    assert GemmaConfig(hidden_size=3072, num_attention_heads=16).head_dim == 256


def test_parts_may_be_dicts_or_objects():
    by_dicts = small()
    by_objects = small(
        vision_config=by_dicts.vision_config, text_config=by_dicts.text_config
    )
    assert by_dicts == by_objects
    assert isinstance(by_dicts.vision_config, SiglipVisionConfig)
    assert isinstance(by_dicts.text_config, GemmaConfig)


def test_configs_do_not_share_their_parts():
    first, second = PaliGemmaConfig(), PaliGemmaConfig()
    first.text_config.hidden_size = 1
    assert second.text_config.hidden_size == 2048


@pytest.mark.parametrize(
    "config",
    [PaliGemmaConfig(), small(), gemma2()],
    ids=["real", "small", "PaliGemma 2"],
)
def test_saved_and_read_again_is_equal(config, tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    config.save_pretrained(folder)
    assert PaliGemmaConfig.from_pretrained(folder) == config
    assert PaliGemmaConfig.from_pretrained(str(folder)) == config


def test_transformers_reads_what_we_write():
    ours = small()
    theirs = transformers.PaliGemmaConfig.from_dict(ours.to_dict())
    for name in ("projection_dim", "image_token_index", "bos_token_id", "eos_token_id"):
        assert getattr(theirs, name) == getattr(ours, name)
    for part in ("vision_config", "text_config"):
        mine, reference = getattr(ours, part), getattr(theirs, part)
        for name in vars(mine):
            if name == "rope_theta":
                assert reference.rope_parameters["rope_theta"] == mine.rope_theta
            elif name != "num_image_tokens":
                assert getattr(reference, name) == getattr(mine, name), name
    assert theirs.vision_config.vision_use_head is False


def test_we_read_what_transformers_writes():
    ours = small()
    theirs = transformers.PaliGemmaConfig.from_dict(ours.to_dict())
    assert PaliGemmaConfig.from_dict(theirs.to_dict()) == ours


def test_newer_names_are_understood():
    values = real()
    values["image_token_id"] = values.pop("image_token_index") + 5
    values["text_config"]["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 500.0,
    }
    values["text_config"]["hidden_act"] = "gelu"  # an old name of the tanh form
    config = PaliGemmaConfig.from_dict(values)
    assert config.image_token_index == 257157
    assert config.text_config.rope_theta == 500.0
    for flat in (10000.0, None):  # where a file has both, transformers takes the nested
        values["text_config"]["rope_theta"] = flat
        assert PaliGemmaConfig.from_dict(values).text_config.rope_theta == 500.0


def test_unknown_keys_are_ignored_and_null_means_default():
    values = real() | {"temperature": 1.0, "bos_token_id": None}
    values["text_config"]["use_cache"] = True
    values["vision_config"]["image_size"] = None
    assert PaliGemmaConfig.from_dict(values) == PaliGemmaConfig()


def test_reading_changes_nothing_in_the_dict():
    values = real()
    PaliGemmaConfig.from_dict(values)
    assert values == real()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SiglipVisionConfig(image_size=225),
            "image_size=225, expected a multiple of patch_size=14",
        ),
        (
            lambda: SiglipVisionConfig(image_size=0),
            "image_size=0",
        ),
        (
            lambda: SiglipVisionConfig(patch_size=0),
            "patch_size=0",
        ),
        (
            lambda: SiglipVisionConfig.from_dict({"hidden_size": 100}),
            "hidden_size=100, expected a multiple of num_attention_heads=16",
        ),
        (
            lambda: SiglipVisionConfig(patch_size=16, num_image_tokens=256),
            "num_image_tokens=256, expected 196: 224 px in patches of 16 px",
        ),
        (
            lambda: SiglipVisionConfig.from_dict({"model_type": "clip_vision_model"}),
            "model_type='clip_vision_model', expected 'siglip_vision_model'",
        ),
        (
            lambda: SiglipVisionConfig.from_dict({"hidden_act": "quick_gelu"}),
            "hidden_act='quick_gelu', expected 'gelu_pytorch_tanh'",
        ),
        (
            lambda: GemmaConfig(num_attention_heads=8, num_key_value_heads=3),
            "num_attention_heads=8, expected a multiple of num_key_value_heads=3",
        ),
        (
            lambda: GemmaConfig(head_dim=7),
            "head_dim=7, expected an even number",
        ),
        (
            lambda: GemmaConfig(head_dim=0),
            "head_dim=0",
        ),
        (
            lambda: GemmaConfig.from_dict({"model_type": "llama"}),
            "model_type='llama', expected 'gemma'",
        ),
        (
            lambda: GemmaConfig.from_dict({"hidden_activation": "silu"}),
            "hidden_activation='silu', expected 'gelu_pytorch_tanh' or 'gelu'",
        ),
        (
            lambda: GemmaConfig.from_dict({"rope_parameters": {"rope_type": "yarn"}}),
            "rope_type='yarn', expected 'default'",
        ),
        (
            lambda: gemma2(model_type="gemma3"),
            "model_type='gemma3', expected 'gemma'",
        ),
        (
            lambda: Gemma2Config.from_dict({"model_type": "gemma"}),
            "model_type='gemma', expected 'gemma2'",
        ),
        (
            lambda: gemma2(layer_types=["full_attention"]),
            r"layer_types=\['full_attention'\], expected 46 of",
        ),
        (
            lambda: gemma2(layer_types=["chunked_attention"] * 46),
            "chunked_attention.*'full_attention'",
        ),
        (lambda: gemma2(sliding_window=0), "sliding_window=0"),
        (
            lambda: gemma2(attn_logit_softcapping=-50.0),
            "attn_logit_softcapping=-50.0",
        ),
        (
            lambda: GemmaConfig(pad_token_id=300_000),
            "pad_token_id=300000, .*vocab_size",
        ),
        (
            lambda: PaliGemmaConfig(pad_token_id=300_000),
            "pad_token_id=300000, .*vocab_size",
        ),
        (
            lambda: PaliGemmaConfig(projection_dim=1024),
            "projection_dim=1024, expected the text model's hidden_size=2048",
        ),
        (
            lambda: PaliGemmaConfig.from_dict({"model_type": "llava"}),
            "model_type='llava', expected 'paligemma'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file .*nowhere.config.json"):
        PaliGemmaConfig.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: Expecting"),
        ("[]", "model_type=None, expected 'paligemma'"),
        ("{}", "model_type=None, expected 'paligemma'"),
        ('{"model_type": "gemma"}', "model_type='gemma', expected 'paligemma'"),
    ],
)
def test_file_that_is_no_config_of_ours(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        PaliGemmaConfig.from_pretrained(tmp_path)


# Spoiled values

CLASSES = (SiglipVisionConfig, GemmaConfig, Gemma2Config, PaliGemmaConfig)
FIELDS = [(cls, f.name) for cls in CLASSES for f in fields(cls)]
SPOILED = [None, True, False, "", "x", "7", [], [1], [None], {}, {"a": 1}, {1}, b"7"]
SPOILED += [math.nan, math.inf, -math.inf, 2.5, -0.5, 0, 0.0, -1, 10**12, 10**400]


@pytest.fixture
def as_users_have_it():
    """Without the tests' own type checker, which would refuse most of it first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def means_something(cls: type, name: str, value: object) -> bool:
    """Whether a field may have this value, of those that are mostly spoiled."""
    kind = str({f.name: f.type for f in fields(cls)}[name])
    if isinstance(value, dict):
        return name in ("vision_config", "text_config")  # unknown keys are ignored
    if "float" in kind and isinstance(value, float):
        return 0 < value < math.inf
    is_zero = value == 0 and type(value) is int
    from_zero = "_token_" in name or name == "num_hidden_layers"
    return ("None" in kind and value is None) or (from_zero and is_zero)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("cls", "name"), FIELDS)
def test_a_spoiled_value_is_refused_by_the_name_of_its_field(cls, name):
    for value in SPOILED:
        if means_something(cls, name, value):
            made = cls(**{name: value})
            assert value in (None, getattr(made, name)) or isinstance(value, dict)
            continue
        with pytest.raises(ValueError, match=name) as caught:
            print(cls(**{name: value}))
        assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(
    ("part", "name"),
    [("vision_config", f.name) for f in fields(SiglipVisionConfig)]
    + [("text_config", f.name) for f in fields(Gemma2Config)]
    + [("", f.name) for f in fields(PaliGemmaConfig)],
)
def test_a_file_with_a_spoiled_value_is_named_with_the_field(part, name, tmp_path):
    """As it stands in a file: null means the default, the rest is refused."""
    for value in (True, "x", [1], math.nan, math.inf, 2.5, -1, 0, 10**12):
        values = json.loads(json.dumps(PALIGEMMA_2))
        (values[part] if part else values)[name] = value
        (tmp_path / "config.json").write_text(json.dumps(values))
        cls = {"vision_config": SiglipVisionConfig, "text_config": Gemma2Config}.get(
            part, PaliGemmaConfig
        )
        if means_something(cls, name, value):
            PaliGemmaConfig.from_pretrained(tmp_path)
            continue
        with pytest.raises(ValueError, match=rf"config\.json.*{name}") as caught:
            PaliGemmaConfig.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("part", ["vision_config", "text_config"])
def test_a_part_that_is_no_dict(part, tmp_path):
    for value in ("x", [], [1], 5, False):
        values = PALIGEMMA_2 | {part: value}
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=part):
            PaliGemmaConfig.from_pretrained(tmp_path)
    # null and nothing at all are the real 3B model's
    text = {part: None, "projection_dim": 2048} if part == "text_config" else {}
    values = PALIGEMMA_2 | {"vision_config": None} | text
    assert PaliGemmaConfig.from_dict(values).vision_config == SiglipVisionConfig()
    values = {name: value for name, value in values.items() if name != part}
    assert PaliGemmaConfig.from_dict(values).vision_config == SiglipVisionConfig()


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_parameters", "default"),
        ("rope_parameters", [10000.0]),
        ("rope_parameters", {"rope_type": ["default"]}),
        ("rope_parameters", {"rope_theta": 0}),
        ("rope_parameters", {"rope_theta": "10000"}),
        ("rope_scaling", 2.0),
        ("hidden_activation", ""),
        ("hidden_activation", ["gelu"]),
        ("hidden_act", 0),
        ("model_type", ["gemma"]),
        ("model_type", ""),
    ],
)
def test_what_a_file_says_beside_the_fields_is_checked_too(name, value):
    with pytest.raises(ValueError, match="rope|hidden_act|model_type"):
        PaliGemmaConfig.from_dict({"text_config": {name: value}})


@pytest.mark.parametrize("text", ["[" * 100_000, "\x00", '{"model_type": "paligemma'])
def test_a_file_that_no_parser_reads(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: "):
        PaliGemmaConfig.from_pretrained(tmp_path)


@pytest.mark.usefixtures("as_users_have_it")
def test_absurd_sizes_cost_nothing():
    """No loop over layers or tokens before a count is refused."""
    for name in ("num_hidden_layers", "vocab_size", "max_position_embeddings"):
        with pytest.raises(ValueError, match=name):
            Gemma2Config(**{name: 10**12})
    with pytest.raises(ValueError, match="image_size"):
        SiglipVisionConfig(image_size=14 * 10**6)  # 10¹² tokens
