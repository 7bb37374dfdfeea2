"""Scenes as training data: pixels, patch targets and packed questions.

Built in notebooks/21_pretraining.ipynb: edit it there, then run `make export`.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .backgrounds import TRAINING_PHOTO_FRACTION
from .images import image_to_pixels
from .mask_tokens import MaskVQVAE
from .packing import pack_questions
from .processing import PaliGemmaProcessor
from .questions import sample_question
from .scenes import TRAINING_SEEDS, TRAINING_STYLES, Scene, all_classes, make_scene

MIN_FRACTION = 0.2  # of a patch's pixels


def patch_targets(scene: Scene, side: int) -> dict[str, Tensor]:
    """What each of side × side patches shows: classes and boxes.

    A patch shows the object that covers most of it, if that is more than MIN_FRACTION.
    `patch_classes` [N] count from 1 in the order of `all_classes`, 0 is background.
    `patch_boxes` [N, 4] are (x0, y0, x1, y1) relative to the patch's center, in
    fractions of the picture's side; zero for background.
    """
    size = scene.image.width
    patch_size = size // side
    owner = scene.owner.reshape(side, patch_size, side, patch_size)
    owner = owner.swapaxes(1, 2).reshape(side * side, -1)  # [N, patch pixels]
    index = np.arange(-1, len(scene.objects))  # background, then the objects
    covered = (owner[..., None] == index).mean(axis=1)  # [N, 1 + objects]
    covered[:, 0] = MIN_FRACTION  # what an object has to beat
    best = covered.argmax(axis=1)  # [N]
    ids = {name: number for number, name in enumerate(all_classes(), start=1)}
    classes = np.array([0, *(ids[thing.label] for thing in scene.objects)])
    boxes = np.array([(0.0,) * 4, *(thing.box for thing in scene.objects)]) / size
    x, y = np.meshgrid(*[(np.arange(side) + 0.5) / side] * 2)
    centers = np.stack([x, y, x, y], axis=-1).reshape(-1, 4)  # [N, 4]
    offsets = (boxes[best] - centers) * (best > 0)[:, None]
    return {
        "patch_classes": torch.from_numpy(classes[best]),
        "patch_boxes": torch.from_numpy(offsets.astype(np.float32)),
    }


TASKS = ("caption", "detect", "segment", "count", "relation", "presence")
AUGMENT_PROB = 0.2  # of the stickers; a style never seen differs in colors above all
EMPTY_PROB = 0.05  # of the scenes: enough to learn that nothing may be there


@dataclass
class SceneDataset(Dataset):
    """Training scenes: patch targets and packed questions; the index is the seed."""

    processor: PaliGemmaProcessor
    vqvae: MaskVQVAE
    num_questions: int = len(TASKS)

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
        # Random(index) would repeat the very numbers that planned the scene.
        rng, rows = random.Random(f"questions {index}"), []
        for task in rng.sample(TASKS, self.num_questions):  # in any order
            question = sample_question(scene, task, rng, self.vqvae.encode_masks)
            prefix = processor.encode_prefix(question.prompt)
            rows.append((prefix, processor.encode_suffix(question.answer)))
        return item | pack_questions(rows, processor.num_image_tokens)


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Items → one batch; packed rows are padded on the right."""
    batch = {}
    for name in items[0]:
        rows = [item[name] for item in items]
        padding = -1 if name == "segment_ids" else 0
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
    return batch
