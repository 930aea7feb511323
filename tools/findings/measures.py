"""What a finished run is measured by: a dict of figures from its own files, or from the answers that eval.py wrote."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from infra.report_data import read_evaluations, read_lines
from metrics.detection import greedy_precision_recall
from rewards import blocks, count_tokens

ANSWERS = "answers.json"  # what eval.py writes into a run's directory
DRAWN = {
    "completion_tokens": "tokens",
    "entropy": "entropy",
    "kl": "KL",
    "groups_equal": "equal groups",
    "truncated": "cut off",
}
SECONDS = ("seconds_draw", "seconds_score", "seconds_learn")


def grounding(out: Path) -> dict[str, float]:
    """The last accuracy on each set, what it gained, the mean IoU on the first, and what was drawn at the end."""
    figures = {}
    if (out / ANSWERS).exists():
        saved = json.loads((out / ANSWERS).read_text(encoding="utf-8"))["summary"]
        evaluations = {name: [summary] for name, summary in saved.items()}
    else:
        evaluations = read_evaluations(out)
    for name, rows in evaluations.items():
        figures[name] = rows[-1]["accuracy"]
        figures[f"{name} start"] = rows[0]["accuracy"]
        figures[f"{name} gain"] = rows[-1]["accuracy"] - rows[0]["accuracy"]
    figures["IoU"] = next(iter(evaluations.values()))[-1]["mean_iou"]
    return figures | drawn(out)


def drawn(out: Path) -> dict[str, float]:
    """The means of the last tenth of the steps, and the seconds of all of them; nothing for what was not trained."""
    rows = read_lines(out / "metrics.jsonl")
    if not rows:
        return {}
    last = rows[-max(1, len(rows) // 10) :]
    figures = {}
    for key, name in DRAWN.items():
        values = [row[key] for row in last if key in row]
        if values:
            figures[name] = float(np.mean(values))
    return figures | {"seconds": sum(row.get(key, 0.0) for row in rows for key in SECONDS)}


def curve(out: Path, name: str) -> list[tuple[float, float]]:
    """(step, accuracy) of each evaluation on a set."""
    return [(row["step"], row["accuracy"]) for row in read_evaluations(out)[name]]


def detection(out: Path) -> dict[str, float]:
    """The figures of the answers to the one set of eval.py's file, and what was drawn at the end."""
    saved = json.loads((out / ANSWERS).read_text(encoding="utf-8"))
    [(name, rows)] = saved["rows"].items()
    summary = saved["summary"][name]
    figures = {"mAP": summary.get("map", 0.0), "unread": summary["unparsed"], "cut off": summary["truncated"]}
    return figures | greedy_precision_recall(images(rows)) | answer_figures(rows) | drawn(out)


def images(rows: Sequence[dict]) -> list[tuple[list, list]]:
    return [(row["predicted"], row["true"]) for row in rows]


def answer_figures(rows: Sequence[dict]) -> dict[str, float]:
    """Boxes, wrong labels and length per image; precision where an asked class is absent; thoughts that are right."""
    num_predicted = sum(len(row["predicted"]) for row in rows)
    num_true = sum(len(row["true"]) for row in rows)
    wrong = sum(label not in classes(row["true"]) for row in rows for _, label in row["predicted"])
    absent = [row for row in rows if set(asked_classes(row["question"])) - classes(row["true"])]
    figures = {
        "boxes": num_predicted / len(rows),
        "boxes / true": num_predicted / max(1, num_true),
        "wrong labels": wrong / len(rows),
        "length": float(np.mean([count_tokens(row["completion"]) for row in rows])),
    }
    if absent:
        figures["precision, absent"] = greedy_precision_recall(images(absent))["precision"]
        figures["only present"] = float(np.mean([_boxes_only_present(row) for row in absent]))
    named = []
    for row in rows:
        thoughts = blocks(row["completion"], "<think>", "</think>")
        if thoughts and thoughts[0].strip():  # an answer at once has an empty one
            named.append(named_classes(thoughts[0], row) == classes(row["true"]))
    if named:
        figures["right thoughts"] = float(np.mean(named))
    return figures


def classes(items: Sequence[tuple]) -> set[str]:
    return {label for _, label in items}


def asked_classes(question: str) -> list[str]:
    """The classes that a question such as "all of: red circle, blue square" asks for."""
    listed = question.rpartition("all of:")[2].removesuffix("at once")
    return [name.strip() for name in listed.split(",") if name.strip()]


def named_classes(thought: str, row: dict) -> set[str]:
    """The asked classes that a thought names."""
    return {name for name in asked_classes(row["question"]) if name in thought}


def _boxes_only_present(row: dict) -> bool:
    """Whether the answer boxes only classes that are there."""
    return classes(row["predicted"]) <= classes(row["true"])
