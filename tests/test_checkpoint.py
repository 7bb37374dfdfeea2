"""The embedded checkpoint: small, complete, honest, transformers' as much as ours."""

import json

import pytest
import torch
import transformers

from vlm.hub import EMBEDDED
from vlm.processing import PaliGemmaProcessor
from vlm.results import table
from vlm.sampling import generate
from vlm.scenes import VALIDATION_SEEDS, make_scene
from vlm.segmentation import load_mask_decoder, parse_segmentations
from vlm.weights import load_hf_model, save_hf_model


def test_fits_and_is_complete():
    files = {path.name: path.stat().st_size for path in EMBEDDED.iterdir()}
    masks = {name: size for name, size in files.items() if name.startswith("mask_")}
    assert sum(files.values()) - sum(masks.values()) <= 15 * 2**20
    assert sum(masks.values()) <= 9 * 2**20
    assert set(masks) == {
        "mask_decoder.safetensors",
        "mask_encoder.safetensors",
        "mask_training_log.jsonl",
    }
    assert set(files) - set(masks) == {
        "README.md",
        "config.json",
        "evaluation.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_card_shows_the_evaluation_of_all_validation_scenes():
    numbers = json.loads((EMBEDDED / "evaluation.json").read_text(encoding="utf-8"))
    assert {column["scenes"] for column in numbers.values()} == {len(VALIDATION_SEEDS)}
    card = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    assert table(numbers) in card


@pytest.mark.parametrize(
    "prompt", ["caption en", "detect owl ; star", "detect car", "segment owl"]
)
def test_transformers_loads_it_unchanged_and_writes_the_same(prompt):
    model, tokenizer = load_hf_model(device="cpu")
    load = transformers.PaliGemmaForConditionalGeneration.from_pretrained
    theirs, info = load(EMBEDDED, output_loading_info=True)
    assert not any(info.values()), info
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    vision = model.config.vision_config
    processor = PaliGemmaProcessor(
        their_tokenizer, vision.num_image_tokens, vision.image_size
    )
    for seed in VALIDATION_SEEDS[:4]:
        inputs = processor([prompt], [make_scene(seed, vision.image_size).image])
        written = theirs.eval().generate(
            **inputs,
            token_type_ids=torch.zeros_like(inputs["input_ids"]),
            max_new_tokens=40,
            do_sample=False,
        )
        text = their_tokenizer.decode(
            written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert generate(model, tokenizer, inputs, max_new_tokens=40) == [text]


def test_a_saved_copy_segments_as_the_original_does(tmp_path):
    model, tokenizer = load_hf_model(device="cpu")
    save_hf_model(model, tokenizer, tmp_path)
    vision = model.config.vision_config
    side = vision.image_size
    processor = PaliGemmaProcessor(tokenizer, vision.num_image_tokens, side)
    scene = make_scene(VALIDATION_SEEDS[0], side)
    inputs = processor([f"segment {scene.objects[0].label}"], [scene.image])
    found = []
    for folder in (None, tmp_path):
        copy, tokenizer = load_hf_model(folder, "cpu")
        (text,) = generate(copy, tokenizer, inputs, max_new_tokens=40)
        decoder = load_mask_decoder(folder)
        found.append(parse_segmentations(text, side, side, decoder))
    original, again = found
    assert len(original) == len(again) > 0
    assert all((a.mask == b.mask).all() for a, b in zip(original, again))
