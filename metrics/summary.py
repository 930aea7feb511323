"""Figures of an evaluation from the rows of its samples, with 95% intervals, and the difference of two evaluations.

A row is a dict with "id", "question", "truncated" and what its score left: "iou" and "box" for one box, "predicted",
"true" and "unread" for a detection, "reward" for anything else. A sample that could not be read has "bad_sample".
"""

import math
from collections.abc import Sequence

import numpy as np

from metrics.detection import average_precision, coco_map, greedy_precision_recall, nms_ap

HEADLINES = ("mean_iou", "map", "reward")


def summarize(rows: Sequence[dict]) -> dict[str, float]:
    """The figures of the rows; those of a kind that no row has are absent."""
    good = [row for row in rows if "bad_sample" not in row]
    if not good:
        first = f"; the first: {rows[0]['bad_sample']}" if rows else ""
        raise ValueError(f"none of {len(rows)} samples could be read{first}")
    summary = {"samples": len(good), "bad_samples": len(rows) - len(good)}
    summary |= _box_figures([row for row in good if "iou" in row])
    summary |= _detection_figures([row for row in good if "predicted" in row])
    summary |= _reward_figures([row for row in good if "reward" in row])
    return summary | {"truncated": float(np.mean([row["truncated"] for row in good]))}


def _box_figures(rows: Sequence[dict]) -> dict[str, float]:
    if not rows:
        return {}
    ious = np.array([row["iou"] for row in rows])
    right = ious > 0.5  # above 0.5, not at it, as VLM-R1 counts
    low, high = share_interval(int(right.sum()), len(rows))
    mean_low, mean_high = mean_interval(ious)
    return {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_75": float((ious > 0.75).mean()),
        "mean_iou": float(ious.mean()),
        "mean_iou_low": mean_low,
        "mean_iou_high": mean_high,
        "unparsed": float(np.mean([row["box"] is None for row in rows])),
    }


def _detection_figures(rows: Sequence[dict]) -> dict[str, float]:
    if not rows:
        return {}
    images = [(row["predicted"], row["true"]) for row in rows]
    unread = float(np.mean([row["unread"] for row in rows]))
    return coco_map(images) | greedy_precision_recall(images) | nms_ap(images) | {"unparsed": unread}


def _reward_figures(rows: Sequence[dict]) -> dict[str, float]:
    if not rows:
        return {}
    rewards = np.array([row["reward"] for row in rows], float)
    low, high = mean_interval(rewards)
    return {"reward": float(rewards.mean()), "reward_low": low, "reward_high": high}


def headline(summary: dict[str, float]) -> str:
    """The name of the figure that says how good a model is: it decides which checkpoint is the best."""
    for name in HEADLINES:
        if name in summary:
            return name
    raise ValueError(
        f"the evaluation has none of the figures {', '.join(HEADLINES)}, so it cannot tell which checkpoint is best: "
        "no sample of the set has a true box; evaluate on samples that have some"
    )


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean over samples: Wilson's if all values are 0 or 1, else by bootstrap.

    A bootstrap of equal values has no width. If all are 0 or all are 1, Wilson's interval still has an honest one; if
    all are another number, the interval is that number.
    """
    if np.isin(values, (0, 1)).all():
        return share_interval(int(values.sum()), len(values))
    return bootstrap_interval(values)


def share_interval(successes: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share by Wilson (JASA 22, 1927): 0 of 8 gives 0 to 0.32, where a bootstrap gives 0 to 0."""
    z, share = 1.959964, successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z * z / count)
    low = middle - half if successes > 0 else 0.0
    high = middle + half if successes < count else 1.0
    return low, high


def bootstrap_interval(values: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of the mean over samples, by resampling them."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def compare(first: Sequence[dict], second: Sequence[dict]) -> dict[str, float]:
    """The paired differences, second minus first, over the samples in both, with their 95% intervals by bootstrap."""
    earlier = {_key(row): row for row in first if "bad_sample" not in row}
    later = {_key(row): row for row in second if "bad_sample" not in row}
    common = [key for key in later if key in earlier]
    differences: dict[str, list[float]] = {}
    for key in common:
        old, new = _scores(earlier[key]), _scores(later[key])
        for name in new:
            if name in old:
                differences.setdefault(name, []).append(new[name] - old[name])
    if not differences:
        raise ValueError(_nothing_to_compare(earlier, later, common))
    result: dict[str, float] = {"samples": len(common)}
    for name, values in differences.items():
        low, high = bootstrap_interval(np.array(values))
        result |= {name: float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}
    return result


def _key(row: dict) -> tuple[str, str]:
    return row["id"], row["question"]


def _scores(row: dict) -> dict[str, float]:
    """What a row is worth, by the name of the figure."""
    scores = {}
    if "iou" in row:
        scores |= {"accuracy": float(row["iou"] > 0.5), "mean_iou": row["iou"]}
    if "predicted" in row:
        predicted, true = row["predicted"], row["true"]
        empty = float(not predicted and not true)
        scores["image_ap"] = average_precision(predicted, true) if predicted and true else empty
    if "reward" in row:
        scores["reward"] = row["reward"]
    return scores


def _nothing_to_compare(earlier: dict, later: dict, common: list) -> str:
    """Why two evaluations cannot be compared."""
    if common:
        old, new = (", ".join(_scores(rows[common[0]])) or "nothing" for rows in (earlier, later))
        return f"the evaluations share {len(common)} samples but no score: the first has {old}, the second {new}"
    old, new = (next((f"{id!r} ({question[:80]!r})" for id, question in rows), "none") for rows in (earlier, later))
    return f"no sample is in both evaluations: the first has {old}, the second {new}; evaluate both on the same data"
