"""What a page shows of a run: its files, the boxes of its answers in pixels of the images, and its kinds of failure."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import answer_boxes
from infra.report_page import Mark
from metrics.detection import compare_items, greedy_matches
from metrics.summary import headline
from model.families import to_image_box
from rewards import answer_or_all, first_box, parse_boxes

MAX_GROUPS = 48
MAX_ANSWERS = 36  # of each kind, over all evaluation sets
FAILURES = ("unreadable", "wrong object", "loose box", "missed", "extra", "wrong", "partly right", "image not read")
KINDS = (*FAILURES, "right")  # the worst first
EVALUATED = (
    "accuracy",
    "mean_iou",
    "map",
    "precision",
    "recall",
    "nms_ap",
    "reward",
)  # figures of a set, in this order
_POINT = re.compile(r"[\[(]\s*+(-?\d++(?:\.\d++)?)\s*+,\s*+(-?\d++(?:\.\d++)?)\s*+[\])]")


@dataclass(frozen=True)
class RunFiles:
    """What a run has written so far."""

    out: Path
    about: dict  # config.json
    metrics: list[dict]
    evaluations: dict[str, list[dict]]  # per set, the figures of each evaluation and its "step"
    groups: list[dict]
    answers: list[dict]


# ---- reading -------------------------------------------------------------------------------------------------------


def read_run(out: Path) -> RunFiles:
    """The files of a run; those that it has not written count as empty."""
    if not (out / "config.json").is_file():
        raise ValueError(f"{out / 'config.json'}: no such file; give the output directory of a run")
    metrics = read_lines(out / "metrics.jsonl")
    done = metrics[-1]["step"] if metrics else 0
    evaluations = read_evaluations(out)
    # A run that was resumed from an earlier checkpoint has answers of a later step until it evaluates again.
    answers = [row for row in read_lines(out / "answers.jsonl") if row["step"] <= done]
    groups = choose_groups(read_lines(out / "completions.jsonl", most=500))
    about = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return RunFiles(out, about, metrics, evaluations, groups, choose_answers(answers))


def read_evaluations(out: Path) -> dict[str, list[dict]]:
    """The figures of each evaluation and its "step", per set."""
    evaluations: dict[str, list[dict]] = {}
    for row in read_lines(out / "eval.jsonl"):
        for key, value in row.items():
            _, _, name = key.partition("eval/")
            folder, _, figure = name.rpartition("/")
            if figure:
                rows = evaluations.setdefault(folder, [])
                if not rows or rows[-1]["step"] != row["step"]:
                    rows.append({"step": row["step"]})
                rows[-1][figure] = value
    return evaluations


def best_row(rows: Sequence[dict]) -> tuple[str, dict]:
    """The headline figure of a set, and the evaluation that is best by it."""
    name = headline(rows[-1])
    return name, max(rows, key=lambda row: -math.inf if row.get(name) is None else row[name])


def read_lines(path: Path, most: int = 0) -> list[dict]:
    """The rows of a JSON lines file, evenly spread if there are more than `most`; a torn last line is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    if 0 < most < len(lines):
        lines = [lines[place] for place in np.linspace(0, len(lines) - 1, most).astype(int)]
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # a process was killed while it wrote
            continue
    return rows


def rewards_of(group: dict) -> list[float]:
    """What each completion earned: the weighted sum, or the plain one in a run that did not log it."""
    return [row.get("reward", sum(value or 0.0 for value in row["rewards"].values())) or 0.0 for row in group["group"]]


def choose_groups(groups: Sequence[dict], most: int = MAX_GROUPS) -> list[dict]:
    """A third of them the most disputed, a third the best and the worst, the rest spread over the run; in order."""
    if len(groups) <= most:
        return list(groups)
    places = range(len(groups))
    mean = [float(np.mean(rewards_of(group))) for group in groups]
    spread = [float(np.std(rewards_of(group))) for group in groups]
    ranked = sorted(places, key=mean.__getitem__)
    chosen = set(sorted(places, key=spread.__getitem__)[-most // 3 :])
    chosen |= {*ranked[: most // 6], *ranked[-most // 6 :]}
    spread_out = np.linspace(0, len(groups) - 1, most - len(chosen)).astype(int).tolist()
    return [groups[place] for place in sorted(chosen.union(spread_out))]


def choose_answers(answers: Sequence[dict]) -> list[dict]:
    """The answers with "kinds", each marked "shown" up to a number of each kind and set; failures come first."""
    share = max(4, MAX_ANSWERS // max(1, len({row["set"] for row in answers})))
    counts: Counter = Counter()
    judged = []
    for row in answers:
        kinds = failures(row)
        counts[row["set"], kinds[0]] += 1
        judged.append({**row, "kinds": kinds, "shown": counts[row["set"], kinds[0]] <= share})
    return sorted(judged, key=lambda row: KINDS.index(row["kinds"][0]))


# ---- boxes and failures --------------------------------------------------------------------------------------------


def failures(row: dict) -> list[str]:
    """What is wrong with an answer, the worst first; ["right"] if nothing is.

    A box is loose if its IoU with the true box is 0.1 to 0.5, and on the wrong object below.
    """
    if "bad_sample" in row:
        return ["image not read"]
    if "predicted" in row:
        return _detection_failures(row)
    if "iou" in row:
        if row["box"] is None:
            return ["unreadable"]
        return ["right" if row["iou"] > 0.5 else "loose box" if row["iou"] >= 0.1 else "wrong object"]
    reward = row.get("reward") or 0.0
    if reward >= 1:
        return ["right"]
    return ["partly right" if reward > 0 else "wrong"]


def _detection_failures(row: dict) -> list[str]:
    """The kinds of failure of a list of boxes: first equal labels are matched, then what is left by place alone."""
    if row["unread"]:
        return ["unreadable"]
    predicted = [tuple(item) for item in row["predicted"] if item[0]]
    true = [tuple(item) for item in row["true"] if item[0]]
    found = {"extra"} if len(predicted) < len(row["predicted"]) else set()
    for least, same_label, kind in ((0.5, True, ""), (0.5, False, "wrong object"), (0.1, True, "loose box")):
        if predicted and true:
            ious, equal = compare_items(predicted, true)
            allowed = (ious >= least) & (equal if same_label else True)
            pairs = greedy_matches(np.where(allowed, ious, 0.0), least)
            if pairs and kind:
                found.add(kind)
            predicted = [item for place, item in enumerate(predicted) if place not in {a for a, _ in pairs}]
            true = [item for place, item in enumerate(true) if place not in {b for _, b in pairs}]
    found |= ({"extra"} if predicted else set()) | ({"missed"} if true else set())
    return sorted(found, key=KINDS.index) or ["right"]


def read_marks(text: str, row: dict, *, listed: bool) -> list[Mark]:
    """The boxes that a text names, or its point, in pixels of the original image; none if the row lacks the sizes.

    `listed` asks for a list of boxes; otherwise the first box counts, as in the reward, also outside of its tags.
    """
    if not row.get("image_size") or not row.get("input_size") or not row.get("family"):
        return []
    items = [(box, label) for box, label in (parse_boxes(text) or []) if box] if listed else []
    if not items:
        box = first_box(text, anywhere=True) or _point(answer_or_all(text, 0))
        items = [(box, None)] if box else []
    place = (row["image_size"], row["input_size"], row["family"], row.get("box_space", ""))
    moved = [Mark(to_image_box(box, *place), "" if label is None else str(label)) for box, label in items]
    return [mark for mark in moved if all(map(math.isfinite, mark.box))]


def _point(text: str) -> list[float] | None:
    """The first point of a text, (x, y) or [x, y], as a box without area."""
    found = _POINT.search(text[:2000])
    return [float(side) for side in found.groups()] * 2 if found else None


def is_listed(truth: str) -> bool:
    """Whether a truth is a list of boxes with labels, or several boxes, or none."""
    items = parse_boxes(truth)
    boxes = [item for item in items or [] if item[0]]
    return items == [] or len(boxes) > 1 or any(label is not None for _, label in boxes)


def scored_marks(row: dict) -> tuple[list[Mark], list[Mark]]:
    """(true, predicted) of an evaluated answer: the boxes that were scored."""
    if "predicted" in row:
        return tuple(
            [Mark(box, "" if label is None else str(label)) for box, label in row[key] if box and None not in box]
            for key in ("true", "predicted")
        )
    boxes = answer_boxes(row["answer"]) if row.get("has_boxes") else None
    true = [Mark(box, "") for box in boxes or []]
    if "iou" in row:
        return true, [Mark(row["box"], "")] if row["box"] else []
    return true, read_marks(row["completion"], row, listed=False) if true else []
