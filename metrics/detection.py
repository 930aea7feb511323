"""Detection metrics: COCO's AP of one image or a data set, greedy precision and recall, OVDEval's NMS-AP.

These are the metrics of Tables 3 to 7 of the VLM-R1 paper (arXiv 2504.07615), which come without code in its
repository. rewards.py scores single completions with the same functions. A model that writes its boxes gives them no
scores: all have 1.0, and a box written earlier counts as the surer one.

Left out: crowds, COCO's average recall, and image sizes (areas are computed from the boxes as given; if they are not in
pixels, pass other `sizes`).

A box is [x1, y1, x2, y2]. An item is (box, label): the box is None if the text had no four numbers, the label is None
if it had none. An image is (predicted, true), two lists of items. P, T: the number of predicted and true items.
"""

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Item = tuple[list[float] | None, str | float | None]
Image = tuple[Sequence[Item], Sequence[Item]]
AreaRange = tuple[float, float]

IOU_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())  # COCO's, rounding included
RECALL_POINTS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100  # COCO's limit per image and class
ALL_AREAS: AreaRange = (0, 1e10)
SIZES: dict[str, AreaRange] = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
OVDEVAL_GROUPS = {
    "proper noun": ("celebrity", "logo", "landmark"),
    "attribute": ("color", "material"),
    "position": ("position",),
    "relationship": ("relationship",),
    "negation": ("negation",),
}


# ---- overlaps ------------------------------------------------------------------------------------------------------
def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """The intersection over union of two boxes, 0 if one of them is empty, inverted or not finite."""
    # VLM-R1 subtracts one from the lower right corners and adds it again: an overlap of up to one pixel is lost there.
    overlap, union, _ = _areas(a, b)
    return overlap / union if 0 < union < math.inf else 0.0


def giou(a: Sequence[float], b: Sequence[float]) -> float:
    """The IoU less the empty share of the enclosing box (arXiv 1902.09630), -1 if a box is not finite."""
    _, union, hull = _areas(a, b)
    return iou(a, b) - (hull - min(union, hull)) / hull if 0 < hull < math.inf else -1.0


def _areas(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The areas of the overlap, the union and the enclosing box; zeros if a coordinate is not finite."""
    if not all(map(math.isfinite, (*a, *b))):
        return 0.0, 0.0, 0.0
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = sum(max(x2 - x1, 0) * max(y2 - y1, 0) for x1, y1, x2, y2 in (a, b)) - overlap
    x, y = (a[0], a[2], b[0], b[2]), (a[1], a[3], b[1], b[3])
    return overlap, union, (max(x) - min(x)) * (max(y) - min(y))


def box_ious(
    predicted: Sequence[Sequence[float]],  # [P, 4]
    true: Sequence[Sequence[float]],  # [T, 4]
) -> np.ndarray:
    """The IoU of every predicted box with every true box, [P, T]; 0 for boxes that are empty or not finite."""
    # COCO recomputes corners from width and height, so we do: a pair on a threshold then falls on the same side.
    p, t = np.array(predicted, float).reshape(-1, 1, 4), np.array(true, float).reshape(1, -1, 4)
    with np.errstate(all="ignore"):  # np.where below replaces what is not finite
        p_size, t_size = p[..., 2:] - p[..., :2], t[..., 2:] - t[..., :2]
        sides = np.minimum(p[..., :2] + p_size, t[..., :2] + t_size) - np.maximum(p[..., :2], t[..., :2])  # [P, T, 2]
        overlap = np.maximum(sides[..., 0], 0) * np.maximum(sides[..., 1], 0)
        union = p_size[..., 0] * p_size[..., 1] + t_size[..., 0] * t_size[..., 1] - overlap
        return np.where((overlap > 0) & (union < np.inf), overlap / union, 0.0)


# ---- one-to-one matches --------------------------------------------------------------------------------------------
def compare_items(predicted: Sequence[Item], true: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """The IoUs of the items that have boxes, and whether their labels agree in lower case, both [P, T]."""
    found, wanted = [item for item in predicted if item[0]], [item for item in true if item[0]]
    a, b = (["" if label is None else str(label).lower() for _, label in items] for items in (found, wanted))
    same = np.array([[x == y for y in b] for x in a], bool).reshape(len(a), len(b))
    return box_ious([box for box, _ in found], [box for box, _ in wanted]), same


def greedy_matches(
    ious: np.ndarray,  # [P, T]
    floor: float = 0.5,
) -> list[tuple[int, int]]:
    """The pairs (p, t) of a one-to-one matching that always takes the best pair left, down to the floor."""
    pairs = np.argwhere(ious >= floor)
    order = np.argsort(-ious[pairs[:, 0], pairs[:, 1]], kind="stable")
    matches: dict[int, int] = {}
    taken: set[int] = set()
    for p, t in pairs[order].tolist():
        if p not in matches and t not in taken:
            matches[p] = t
            taken.add(t)
    return list(matches.items())


def greedy_precision_recall(images: Sequence[Image], threshold: float = 0.5) -> dict[str, float]:
    """The shares of predicted and of true items that are matched one to one, best IoU first; 0 without items."""
    # The paper does not say whether labels must agree; here they must, in lower case, as in the od_f1 reward.
    matched = 0
    for predicted, true in images:
        ious, same = compare_items(predicted, true)
        matched += len(greedy_matches(np.where(same, ious, -1.0), threshold))
    num_predicted, num_true = (sum(len(image[side]) for image in images) for side in (0, 1))
    return {"precision": matched / max(num_predicted, 1), "recall": matched / max(num_true, 1)}


def matched_f1(predicted: Sequence[Item], true: Sequence[Item]) -> float:
    """The mean over COCO's thresholds of the F1 under one matching, which pairs no different labels."""
    ious, same = compare_items(predicted, true)
    overlaps = [float(ious[pair]) for pair in greedy_matches(np.where(same, ious, 0.0))]
    # The best pairs are taken first, so the matching at a higher threshold is the beginning of the one at 0.5.
    hits = sum(overlap >= threshold for overlap in overlaps for threshold in IOU_THRESHOLDS)
    return 2 * hits / len(IOU_THRESHOLDS) / (len(predicted) + len(true))


def detection_score(predicted: Sequence[Item], true: Sequence[Item]) -> float:
    """VLM-R1's detection_score: 0.7 x the matched IoU per true box (0 for a wrong label) + 0.3 x completeness."""
    ious, same = compare_items(predicted, true)
    matches = greedy_matches(ious)
    position = sum(float(ious[pair]) for pair in matches if same[pair]) / len(true)
    missed, false_alarms = 1 - len(matches) / len(true), 1 - len(matches) / len(predicted)
    return min(0.7 * position + 0.3 * (1 - (missed + false_alarms) / 2), 1.0)


# ---- COCO's average precision --------------------------------------------------------------------------------------
def average_precision(
    predicted: Sequence[Item],  # [P], the surest first
    true: Sequence[Item],  # [T]
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> float:
    """COCO's AP of one image: the mean precision over true classes, thresholds and 101 recalls; 0 without truth."""
    # Boxes of other classes cost nothing, in COCO too: the loophole that od_length closes (arXiv 2504.07615, 4.3).
    ranking = rank_predictions([(predicted, true)], min(thresholds))
    values = class_precisions(ranking, ALL_AREAS, thresholds)
    return sum(values) / len(values) if values else 0.0


def coco_map(images: Sequence[Image], sizes: Mapping[str, AreaRange] = SIZES) -> dict[str, float]:
    """COCOeval's AP of all boxes, at IoU 0.5, at 0.75 and by size of the true box; figures without truth are absent."""
    ranking = rank_predictions(images, IOU_THRESHOLDS[0])
    values = {
        "map": class_precisions(ranking, ALL_AREAS, IOU_THRESHOLDS),
        "map_50": class_precisions(ranking, ALL_AREAS, [0.5]),
        "map_75": class_precisions(ranking, ALL_AREAS, [0.75]),
    }
    values |= {f"map_{name}": class_precisions(ranking, area, IOU_THRESHOLDS) for name, area in sizes.items()}
    return {name: sum(aps) / len(aps) for name, aps in values.items() if aps}


class Ranking(NamedTuple):
    """The predictions of all images in COCO's order, and the true boxes, numbered through all images."""

    labels: list[str | float | None]  # [P]
    areas: list[float | None]  # [P] None if the box is not finite
    candidates: list[list[tuple[float, int]]]  # [P] (IoU, t) of the true boxes each may take
    true_labels: list[str | float | None]  # [T]
    true_areas: list[float | None]  # [T]


def rank_predictions(images: Sequence[Image], floor: float) -> Ranking:
    """The predictions by image and then as written: at most 100 per image and class, and no unknown classes.

    A prediction may take a true box of its label and image if their IoU reaches the floor. An item without a box is no
    prediction.
    """
    # All scores are equal, so COCOeval's stable sort leaves images and answers in their order.
    known = {label for _, true in images for box, label in true if box}
    ranking = Ranking([], [], [], [], [])
    for predicted, true in images:
        true_boxes = [box for box, _ in true if box]
        true_labels = [label for box, label in true if box]
        boxes, labels, seen = [], [], dict.fromkeys(known, 0)
        for box, label in predicted:
            if box and label in known and seen[label] < MAX_DETECTIONS:
                seen[label] += 1
                boxes.append(box)
                labels.append(label)
        candidates: list[list[tuple[float, int]]] = [[] for _ in boxes]
        ious, first = box_ious(boxes, true_boxes), len(ranking.true_labels)
        for p, t in np.argwhere(ious >= floor).tolist():
            if labels[p] == true_labels[t]:
                candidates[p].append((float(ious[p, t]), first + t))
        ranking.labels.extend(labels)
        ranking.areas.extend(map(_area, boxes))
        ranking.candidates.extend(candidates)
        ranking.true_labels.extend(true_labels)
        ranking.true_areas.extend(map(_area, true_boxes))
    return ranking


def _area(box: Sequence[float]) -> float | None:
    """The area of a box, None if it is not finite."""
    return (box[2] - box[0]) * (box[3] - box[1]) if all(map(math.isfinite, box)) else None


def _outside(area: float | None, bounds: AreaRange) -> bool:
    """Whether COCO leaves a box of that area out; neighbouring ranges share a bound."""
    # A box that is not finite is inside every range, so that it counts as a wrong prediction in each.
    return area is not None and not bounds[0] <= area <= bounds[1]


def class_precisions(ranking: Ranking, bounds: AreaRange, thresholds: Sequence[float]) -> list[float]:
    """The AP at each threshold of each class that has a true box within the bounds."""
    ignored = [_outside(area, bounds) for area in ranking.true_areas]
    outside = [_outside(area, bounds) for area in ranking.areas]
    candidates = ranking.candidates
    if any(ignored):  # a prediction is offered the true boxes that count before those that do not
        candidates = [sorted(pairs, key=lambda pair: ignored[pair[1]]) for pairs in candidates]
    totals = Counter(label for label, ignore in zip(ranking.true_labels, ignored, strict=True) if not ignore)
    columns = zip(ranking.labels, candidates, outside, strict=True)
    rows = [(label, pairs, left_out) for label, pairs, left_out in columns if label in totals]
    aps = []
    for threshold in thresholds:
        ranks = hit_ranks(rows, ignored, threshold)
        aps += [_mean_precision(ranks.get(label, []), total) for label, total in totals.items()]
    return aps


def hit_ranks(
    rows: Sequence[tuple],  # [P] label, candidates, and whether the prediction is left out if it takes nothing
    ignored: Sequence[bool],  # [T] whether a prediction that takes this true box is left out
    threshold: float,
) -> dict[str | float | None, list[int]]:
    """The ranks of the hits within each class: a prediction takes the best true box left, the last of equal ones."""
    taken: set[int] = set()
    rank: dict = {}
    hits: dict = {}
    for label, candidates, left_out in rows:
        best, chosen = threshold, None
        for overlap, t in candidates:
            if chosen is not None and ignored[t] and not ignored[chosen]:
                break
            if overlap >= best and t not in taken:
                best, chosen = overlap, t
        if chosen is None:
            rank[label] = rank.get(label, 0) + (not left_out)
            continue
        taken.add(chosen)
        if not ignored[chosen]:
            rank[label] = rank.get(label, 0) + 1
            hits.setdefault(label, []).append(rank[label])
    return hits


def _mean_precision(ranks: list[int], num_true: int) -> float:
    """The mean over 101 recalls of the best precision at that recall or a higher one."""
    weights, best, total = _recall_weights(num_true), 0.0, 0.0
    for k in range(len(ranks), 0, -1):
        best = max(best, k / ranks[k - 1])
        total += weights[k] * best
    return (total + weights[0] * best) / len(RECALL_POINTS)


@functools.cache
def _recall_weights(num_true: int) -> list[int]:
    """How many of the 101 recalls the k-th hit is the first to reach, for k from 0 to num_true."""
    needed = np.searchsorted(np.arange(num_true + 1) / num_true, RECALL_POINTS)
    return np.bincount(needed, minlength=num_true + 1).tolist()


# ---- OVDEval -------------------------------------------------------------------------------------------------------
def nms_ap(images: Sequence[Image], threshold: float = 0.5, keep_last: bool = False) -> dict[str, float]:
    """OVDEval's NMS-AP, COCO's AP of what `suppress` keeps, over all IoU thresholds and at 0.5; {} without truth."""
    kept = [(suppress(predicted, true, threshold, keep_last), true) for predicted, true in images]
    scores = coco_map(kept, sizes={})
    return {"nms_ap": scores["map"], "nms_ap_50": scores["map_50"]} if scores else {}


def suppress(
    predicted: Sequence[Item], true: Sequence[Item], threshold: float = 0.5, keep_last: bool = False
) -> list[Item]:
    """The predictions without those that overlap a true box, of any class, for which another one is kept."""
    # https://github.com/om-ai-lab/OVDEval/blob/main/eval.py (Algorithm 1 of arXiv 2308.13177): of the predictions above
    # the threshold with one true box the surest is kept, and what is kept for one true box is not dropped for another.
    # Predictions that overlap no true box stay, however much they overlap each other. Its argsort()[::-1] keeps the
    # last of equal scores (as far as argsort is stable); we keep the first, the surest by our reading: keep_last
    # gives theirs. Assumed: invented labels suppress too (the official result file cannot hold them).
    places = [i for i, (box, _) in enumerate(predicted) if box]
    boxes = [box for box, _ in predicted if box]
    near = box_ious(boxes, [box for box, _ in true if box]) > threshold  # [P, T]
    kept, rivals = set(), set()
    for column in near.T:
        picked = [places[p] for p in np.flatnonzero(column).tolist()]
        rivals.update(picked)
        kept.update(picked[-1:] if keep_last else picked[:1])
    return [item for i, item in enumerate(predicted) if i in kept or i not in rivals]


def ovdeval_overall(per_set: Mapping[str, float]) -> float:
    """OVDEval's overall score: the mean of its five groups, each the mean of its sets."""
    missing = [name for sets in OVDEVAL_GROUPS.values() for name in sets if name not in per_set]
    if missing:
        raise ValueError(f"per_set has no {', '.join(missing)}; the overall score needs all eight sets of OVDEval")
    groups = [sum(per_set[name] for name in sets) / len(sets) for sets in OVDEVAL_GROUPS.values()]
    return sum(groups) / len(groups)
