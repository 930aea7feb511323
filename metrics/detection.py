"""Detection metrics over a data set: COCO's mAP, greedy precision and recall, OVDEval's NMS-AP.

These are the metrics of Tables 3 to 7 of the VLM-R1 paper (arXiv 2504.07615), of which its repository has no code. A
model that writes its boxes gives them no scores: all have 1.0, so a box written earlier counts as the surer one.

Left out: crowds, COCO's average recall, and image sizes (areas are those of the boxes as given; where they are not in
pixels, pass other `sizes`).

An image is (predicted, true), two lists of items; a box is [x1, y1, x2, y2], an item (box, label), as in rewards.py.
P, T: the number of items predicted and true, here in all images together; K: the number of classes.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rewards import (
    IOU_THRESHOLDS,
    MAX_AREA,
    MAX_DETECTIONS,
    Item,
    _comparison,
    _mean_precision,
    box_ious,
    greedy_matches,
)

Image = tuple[list[Item], list[Item]]
AreaRange = tuple[float, float]

SIZES: dict[str, AreaRange] = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, MAX_AREA)}
OVDEVAL_GROUPS = {
    "proper noun": ("celebrity", "logo", "landmark"),
    "attribute": ("color", "material"),
    "position": ("position",),
    "relationship": ("relationship",),
    "negation": ("negation",),
}


class Ranking(NamedTuple):
    """The predictions COCO ranks, in its order, with the true boxes that each may take."""

    areas: list[float]  # [P]
    classes: list[int]  # [P]
    candidates: list[list[tuple[float, int]]]  # [P] lists of (IoU, t), the class right and the IoU enough
    true_areas: list[float]  # [T]
    true_classes: list[int]  # [T]


def coco_map(images: Sequence[Image], sizes: Mapping[str, AreaRange] | None = None) -> dict[str, float]:
    """COCOeval's AP of all boxes, at IoU 0.5 and 0.75, and by size of the true box; -1 where there is no truth."""
    ranking = rank_predictions(images)
    everything = precisions(ranking, (0, MAX_AREA))
    scores = {"map": everything} | {f"map_{percent}": everything[[t]] for percent, t in ((50, 0), (75, 5))}
    scores |= {f"map_{name}": precisions(ranking, area) for name, area in (SIZES if sizes is None else sizes).items()}
    return {name: float(values.mean()) if values.size else -1.0 for name, values in scores.items()}


def rank_predictions(images: Sequence[Image]) -> Ranking:
    """The predictions by image and then as written, at most 100 per image and class, without unknown classes."""
    # With equal scores COCOeval's stable sort leaves images and answers in order. An item without a box is no
    # prediction here, as in rewards.average_precision.
    labels = dict.fromkeys(label for _, true in images for box, label in true if box)
    numbers = {label: k for k, label in enumerate(labels)}
    ranking = Ranking([], [], [], [], [])
    for predicted, true in images:
        found, wanted, seen = [], [(box, numbers[label]) for box, label in true if box], Counter()
        for box, label in predicted:
            if box and label in numbers and seen[label] < MAX_DETECTIONS:
                seen[label] += 1
                found.append((box, numbers[label]))
        ious = box_ious([box for box, _ in found], [box for box, _ in wanted])
        same = np.equal.outer([k for _, k in found], [k for _, k in wanted])  # [P, T] of this image
        candidates, first = [[] for _ in found], len(ranking.true_areas)
        for p, t in np.argwhere(same & (ious >= IOU_THRESHOLDS[0])).tolist():
            candidates[p].append((float(ious[p, t]), first + t))
        ranking.areas.extend(_area(box) for box, _ in found)
        ranking.classes.extend(k for _, k in found)
        ranking.candidates.extend(candidates)
        ranking.true_areas.extend(_area(box) for box, _ in wanted)
        ranking.true_classes.extend(k for _, k in wanted)
    return ranking


def _area(box: Sequence[float]) -> float:
    """The area of a box, NaN if it is not finite."""
    return (box[2] - box[0]) * (box[3] - box[1]) if all(map(math.isfinite, box)) else math.nan


def precisions(ranking: Ranking, area: AreaRange) -> np.ndarray:
    """AP by IoU threshold and class, [10, K'], over the K' classes that have a true box of that area."""
    # Bounds belong to both neighbours. NaN is outside of no range: a box that is not finite is wrong in each.
    ignored = [a < area[0] or a > area[1] for a in ranking.true_areas]
    outside = [a < area[0] or a > area[1] for a in ranking.areas]
    candidates = ranking.candidates
    if any(ignored):  # a prediction is offered the true boxes that count before those that do not
        candidates = [sorted(c, key=lambda pair: ignored[pair[1]]) if len(c) > 1 else c for c in candidates]
    totals = Counter(k for k, ignore in zip(ranking.true_classes, ignored, strict=True) if not ignore)
    rows = [row for row in zip(ranking.classes, candidates, outside, strict=True) if row[0] in totals]
    aps = []
    for threshold in IOU_THRESHOLDS:
        ranks = hit_ranks(rows, ignored, threshold)
        aps.append([_mean_precision(ranks.get(k, []), total) for k, total in totals.items()])
    return np.array(aps)


def hit_ranks(
    rows: list[tuple[int, list[tuple[float, int]], bool]],  # [P] class, candidates, whether left out without a match
    ignored: list[bool],  # [T] whether what takes this true box is left out
    threshold: float,
) -> dict[int, list[int]]:
    """The ranks of the hits within each class: each prediction takes the best true box left, of equals the last."""
    # rewards._hit_ranks with COCO's rule for areas: one that takes an ignored box is neither right nor wrong.
    taken: set[int] = set()
    rank, ranks = Counter(), {}
    for k, candidates, left_out in rows:
        best, chosen = threshold, None
        for overlap, t in candidates:
            if chosen is not None and ignored[t] and not ignored[chosen]:
                break
            if overlap >= best and t not in taken:
                best, chosen = overlap, t
        if chosen is None:
            rank[k] += not left_out
            continue
        taken.add(chosen)
        if not ignored[chosen]:
            rank[k] += 1
            ranks.setdefault(k, []).append(rank[k])
    return ranks


def greedy_precision_recall(images: Sequence[Image], threshold: float = 0.5) -> dict[str, float]:
    """The shares of predicted and of true items matched one to one, best IoU first; 0 where there are no items."""
    # The paper does not say whether labels must agree; here they must, in lower case, as in the od_f1 reward.
    matched = 0
    for predicted, true in images:
        ious, same = _comparison(predicted, true)
        matched += len(greedy_matches(np.where(same, ious, -1.0), threshold))
    num_predicted, num_true = (sum(len(image[side]) for image in images) for side in (0, 1))
    return {"precision": matched / max(num_predicted, 1), "recall": matched / max(num_true, 1)}


def nms_ap(images: Sequence[Image], threshold: float = 0.5, keep_last: bool = False) -> dict[str, float]:
    """OVDEval's NMS-AP (COCO's AP after `suppress`), averaged over the IoU thresholds and at 0.5."""
    kept = [(suppress(predicted, true, threshold, keep_last), true) for predicted, true in images]
    scores = coco_map(kept, sizes={})
    return {"nms_ap": scores["map"], "nms_ap_50": scores["map_50"]}


def suppress(predicted: list[Item], true: list[Item], threshold: float = 0.5, keep_last: bool = False) -> list[Item]:
    """The predictions without those that overlap a true box, of any class, for which another one is kept."""
    # https://github.com/om-ai-lab/OVDEval/blob/main/eval.py (Algorithm 1 of arXiv 2308.13177): of the predictions above
    # the threshold with one true box the surest is kept, and what is kept for one true box is not dropped for another.
    # Predictions that overlap no true box stay, however much they overlap each other. Its argsort()[::-1] keeps the
    # last of equal scores (as far as argsort is stable); we keep the first, the surest by our reading: keep_last
    # gives theirs. Assumed: invented labels suppress too (the official result file cannot hold them).
    places = [i for i, (box, _) in enumerate(predicted) if box]
    near = box_ious([predicted[i][0] for i in places], [box for box, _ in true if box]) > threshold  # [P, T]
    kept, rivals = set(), set()
    for column in near.T:
        picked = np.flatnonzero(column).tolist()
        rivals.update(places[p] for p in picked)
        kept.update(places[p] for p in (picked[-1:] if keep_last else picked[:1]))
    return [item for i, item in enumerate(predicted) if i in kept or i not in rivals]


def ovdeval_overall(per_set: Mapping[str, float]) -> float:
    """OVDEval's overall score: the mean of its five groups, each the mean of its sets."""
    missing = [name for sets in OVDEVAL_GROUPS.values() for name in sets if name not in per_set]
    if missing:
        raise ValueError(f"per_set has no {', '.join(missing)}; the overall score needs all eight sets of OVDEval")
    groups = [sum(per_set[name] for name in sets) / len(sets) for sets in OVDEVAL_GROUPS.values()]
    return sum(groups) / len(groups)
