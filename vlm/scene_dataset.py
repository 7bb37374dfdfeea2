"""Scenes as training data: pixels, patch targets and packed questions.

Built in notebooks/21_pretraining.ipynb: edit it there, then run `make export`.
"""

import math
import random

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .auxiliary import PATCH_TARGETS, patch_targets
from .backgrounds import TRAINING_PHOTO_FRACTION
from .images import image_to_pixels
from .mask_tokens import MaskVQVAE, crop_to_square
from .packing import pack_questions
from .processing import PaliGemmaProcessor
from .questions import MaskToCodes, sample_question
from .scenes import TRAINING_SEEDS, TRAINING_STYLES, Scene, make_scene

__all__ = ["TASKS", "encode_masks", "SceneDataset", "collate"]

TASKS = ("caption", "detect", "segment", "count", "relation", "presence")
AUGMENT_PROB = 0.2  # of the stickers; a style never seen differs in colors above all
EMPTY_PROB = 0.05  # of the scenes: enough to learn that nothing may be there


@torch.no_grad()
def encode_masks(scene: Scene, vqvae: MaskVQVAE) -> MaskToCodes:
    """Encode all masks of a scene in one pass → a function that looks them up."""
    crops = [thing.cropped_mask for thing in scene.objects]
    if not crops:
        return vqvae.encode_mask
    features = vqvae.encoder(torch.stack([crop_to_square(crop) for crop in crops]))
    codes = vqvae.decoder.codebook.nearest(features).tolist()  # [objects, 16]
    known = {crop.tobytes(): code for crop, code in zip(crops, codes, strict=True)}
    return lambda crop: known[crop.tobytes()]


class SceneDataset(Dataset):
    """Scenes of training seeds with patch targets and questions; the index is the seed.

    The first `vision_only` items have no questions, the others `num_questions`.
    """

    def __init__(
        self,
        processor: PaliGemmaProcessor,
        vqvae: MaskVQVAE,
        vision_only: int = 0,
        num_questions: int = len(TASKS),
    ):
        self.processor, self.vqvae = processor, vqvae
        self.vision_only, self.num_questions = vision_only, num_questions

    def __len__(self) -> int:
        return len(TRAINING_SEEDS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Pixels, patch targets and, in one row, questions of different tasks."""
        processor = self.processor
        scene = make_scene(
            TRAINING_SEEDS[index],
            processor.image_size,
            TRAINING_STYLES,
            augment_prob=AUGMENT_PROB,
            empty_prob=EMPTY_PROB,
            photo_fraction=TRAINING_PHOTO_FRACTION,
        )
        item = patch_targets(scene, math.isqrt(processor.num_image_tokens))
        item["pixel_values"] = image_to_pixels(scene.image, processor.image_size)
        if index < self.vision_only:
            return item
        encode_mask = encode_masks(scene, self.vqvae)
        # Random(index) would repeat the very numbers that planned the scene.
        rng, rows = random.Random(f"questions {index}"), []
        for task in rng.sample(TASKS, self.num_questions):  # in any order
            question = sample_question(scene, task, rng, encode_mask)
            prefix = processor.encode_prefix(question.prompt)
            rows.append((prefix, processor.encode_suffix(question.answer)))
        return item | pack_questions(rows, processor.num_image_tokens)


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Items → one batch; packed rows are padded on the right."""
    batch = {
        name: torch.stack([item[name] for item in items])
        for name in ("pixel_values", *PATCH_TARGETS)
    }
    padding = {"input_ids": 0, "position_ids": 0, "token_type_ids": 0}
    padding["segment_ids"] = -1
    for name, value in padding.items():
        if name in items[0]:
            rows = [item[name] for item in items]
            batch[name] = pad_sequence(rows, batch_first=True, padding_value=value)
    return batch
