"""Metrics: exact match, F1 of classes, average precision (COCO's), mean mask IoU.

Built in notebooks/28_metrics.ipynb: edit it there, then run `make export`.
"""

import contextlib
import io
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .mask_tokens import mask_iou
from .questions import parse_caption
from .scenes import Scene

# Detections, Segmentations or a scene's objects: label, box, mask, score as they have.
Objects = Sequence[Any]


def exact_match(answers: Sequence[str], targets: Sequence[str]) -> float:
    """The fraction of answers that are right to the letter.

    Raises ValueError unless answers and targets are equally many, and not none;
    TypeError for answers that aren't strings.
    """
    if not all(isinstance(answer, str) for answer in answers):
        raise TypeError("answers are strings: give each Generation's .text")
    return fmean(a == t for a, t in zip(answers, targets, strict=True))


def class_f1(captions: Sequence[str], scenes: Sequence[Scene]) -> float:
    """F1 of the classes that captions name, micro-averaged: pooled over all scenes.

    A class counts once a scene, however many there are and wherever the caption names
    it. 0 where nothing is right. Raises ValueError for unequal numbers of both.
    """
    true_positives = total = 0
    for text, scene in zip(captions, scenes, strict=True):
        named = {kind for kind, count in parse_caption(text).items() if count}
        true_positives += len(named & scene.counts.keys())
        total += len(named) + len(scene.counts)  # 2 TP + FP + FN
    return 2 * true_positives / max(total, 1)


def _to_coco(images: Sequence[Objects], labels: Sequence[str]) -> COCO:
    "Objects as COCO's annotations; those of other classes than `labels` are ignored."
    rows = []
    for index, objects in enumerate(images):
        for one in objects:
            x0, y0, x1, y1 = one.box
            row = {"id": len(rows) + 1, "image_id": index, "category_id": one.label}
            score = getattr(one, "score", 1.0)  # a scene's own objects have none
            row |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
            row |= {"iscrowd": 0, "area": 1}  # sizes aren't told apart
            rows.append(row)
    data = COCO()
    data.dataset = {
        "images": [{"id": i, "height": 0, "width": 0} for i in range(len(images))],
        "categories": [{"id": label} for label in labels],
        "annotations": rows,
    }
    data.createIndex()
    return data


def average_precision(
    found: Sequence[Objects], truth: Sequence[Objects]
) -> Float[np.ndarray, "10"]:
    """COCO's average precision at the IoU thresholds 0.5, 0.55 … 0.95, by pycocotools.

    For each image its objects, compared by their boxes. The first value is AP50, the
    mean of all ten AP50:95. Classes without a true object are left out. Source: Lin et
    al. 2014. Raises ValueError for unequal numbers of images, and for no true object.
    """
    if len(found) != len(truth):
        raise ValueError(f"answers for {len(found)} images, truth for {len(truth)}")
    labels = sorted({one.label for objects in truth for one in objects})
    if not labels:
        raise ValueError("no image has a true object: there is no recall to measure")
    with contextlib.redirect_stdout(io.StringIO()):  # it reports each step
        data = [_to_coco(images, labels) for images in (truth, found)]
        evaluator = COCOeval(*data, "bbox")
        evaluator.params.areaRng, evaluator.params.maxDets = [[0, 2]], [100]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"][..., 0, 0].mean(axis=(1, 2))  # [10, 101, K] → 10


def object_ious(found: Objects, truth: Objects) -> list[float]:
    """The mask IoU of each true object of an image with the found one it is matched to.

    Pairs have the same label and are matched greedily, the best IoU first, each object
    once. Without a partner it is 0; what is found beyond that changes nothing. Raises
    ValueError where masks are of different sizes.
    """
    if len(sizes := {one.mask.shape for one in [*found, *truth]}) > 1:
        raise ValueError(f"masks of different sizes: {sorted(sizes)}")
    pairs = []  # (IoU, index of the true object, index of the found one)
    for i, true in enumerate(truth):
        for j, guess in enumerate(found):
            if guess.label == true.label:
                masks = (torch.from_numpy(one.mask.copy()) for one in (guess, true))
                pairs.append((mask_iou(*masks).item(), i, j))
    ious, taken = {}, set()
    for iou, i, j in sorted(pairs, key=lambda pair: -pair[0]):
        if i not in ious and j not in taken:
            ious[i] = iou
            taken.add(j)
    return [ious.get(i, 0.0) for i in range(len(truth))]


def mean_iou(found: Sequence[Objects], truth: Sequence[Objects]) -> float:
    """The mean of `object_ious` over all true objects of all images together.

    Raises ValueError where there is none, or for unequal numbers of images.
    """
    pairs = zip(found, truth, strict=True)
    return fmean(iou for pair in pairs for iou in object_ious(*pair))


def false_alarms(found: Sequence[Objects], truth: Sequence[Objects]) -> float:
    """The number of found objects whose class isn't in their image, per image."""
    labels = [{one.label for one in objects} for objects in truth]
    return fmean(
        sum(one.label not in there for one in objects)
        for objects, there in zip(found, labels, strict=True)
    )
