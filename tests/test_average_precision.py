"""The AP of one image against pycocotools, as a function and as a reward."""

import contextlib
import io
import json
import random

import numpy as np
import pytest

from metrics.detection import average_precision
from rewards import REWARDS


def random_image(draw: random.Random) -> tuple[list, list]:
    """Predicted and true items: ties, loose, inverted and huge boxes, absent classes, empty sides, more than 100."""

    def box() -> list[float]:
        x, y, width, height = draw.uniform(0, 500), draw.uniform(0, 400), draw.uniform(1, 150), draw.uniform(1, 150)
        exact = [x, y, x + width, y + height]
        return exact if draw.random() < 0.5 else [float(round(v)) for v in exact]

    labels = draw.sample(["cat", "dog", "red bus", "person", "Cat"], draw.randint(1, 5))
    true = [(box(), draw.choice(labels)) for _ in range(draw.choice([0, 1, 2, 3, 5, 8, 20]))]
    predicted = []
    for corners, label in true:
        for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
            spread = draw.choice([0, 0, 1, 4, 12, 30])
            label = label if draw.random() < 0.85 else draw.choice(["cat", "dog", "zebra"])
            predicted.append(([v + spread * draw.uniform(-1, 1) for v in corners], label))
    crowd = draw.choice([["cat", "dog", "zebra"], labels[:1]])
    predicted += [(box(), draw.choice(crowd)) for _ in range(draw.choice([0, 0, 0, 1, 3, 130]))]
    predicted += [([v[2], v[1], v[0], v[3]], label) for v, label in predicted[:2] if draw.random() < 0.2]
    predicted += [([0.0, 0.0, 2e5, 2e5], draw.choice(labels))] * (draw.random() < 0.05)
    true += [([v[0], v[3], v[2], v[1]], label) for v, label in true[:1] if draw.random() < 0.1]
    draw.shuffle(predicted)
    return (predicted if draw.random() < 0.95 else []), true


def coco_precisions(images: list[tuple[list, list]]) -> list[np.ndarray]:
    """Per image pycocotools' precisions [10, 101, classes], -1 where a class has no truth."""
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    # All in one picture, every class of every image a category of its own: categories never meet, so nothing changes,
    # and 2,500 images take seconds.
    categories = [(i, label) for i, (_, true) in enumerate(images) for label in dict.fromkeys(name for _, name in true)]
    ids = {category: k for k, category in enumerate(categories)}

    def rows(side: int) -> list[dict]:
        found = [(box, ids.get((i, label))) for i, image in enumerate(images) for box, label in image[side]]
        found = [([b[0], b[1], b[2] - b[0], b[3] - b[1]], k) for b, k in found if k is not None]
        common = {"image_id": 0, "iscrowd": 0, "score": 1.0}
        return [
            common | {"id": n, "category_id": k, "bbox": b, "area": b[2] * b[3]} for n, (b, k) in enumerate(found, 1)
        ]

    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {"info": {}, "images": [{"id": 0, "width": 2048, "height": 2048}], "annotations": rows(1)}
        truth.dataset["categories"] = [{"id": k, "name": str(k)} for k in ids.values()]
        truth.createIndex()
        run = evaluation.COCOeval(truth, truth.loadRes(rows(0)), "bbox")
        run.params.areaRng, run.params.areaRngLbl, run.params.maxDets = [[0, 1e10]], ["all"], [100]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][..., 0, 0]
    return [
        precision[..., [ids[i, label] for label in dict.fromkeys(n for _, n in true)]]
        for i, (_, true) in enumerate(images)
    ]


def test_average_precision_is_that_of_pycocotools_on_2500_images():
    images = [random_image(random.Random(seed)) for seed in range(2500)]
    worst = 0.0
    for (predicted, true), precision in zip(images, coco_precisions(images), strict=True):
        for thresholds, part in ((None, precision), ([0.5], precision[:1])):
            counted = part[part > -1]
            expected = counted.mean() if counted.size else 0.0
            ours = average_precision(predicted, true, *([thresholds] if thresholds else []))
            worst = max(worst, abs(ours - expected))
    assert worst < 1e-12
    scores = [average_precision(*image) for image in images]
    assert min(scores) == 0.0 and max(scores) == 1.0 and len(set(scores)) > 1000  # the images are of every kind


def test_the_same_image_through_the_reward_and_through_pycocotools():
    images = [random_image(random.Random(seed)) for seed in range(3000, 3100)]
    for (predicted, true), precision in zip(images, coco_precisions(images), strict=True):
        if predicted and true:
            sides = [[{"bbox_2d": box, "label": label} for box, label in side] for side in (predicted, true)]
            expected = precision[precision > -1].mean() if (precision > -1).any() else 0.0
            completion = f"<answer>```json\n{json.dumps(sides[0])}\n```</answer>"
            earned = [REWARDS[name](completion, json.dumps(sides[1])) for name in ("od_ap", "od_length")]
            shorter = min(1, len(true) / len(predicted))
            assert earned == pytest.approx([expected, expected * shorter], abs=1e-12)
