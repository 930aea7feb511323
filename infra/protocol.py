"""What a model is evaluated under: the options that were given, then what its run says, then defaults."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from infra.config import EvalConfig
from infra.mix import DataFile, file_names, read_mix
from infra.plugins import check_plugin
from model.families import MAX_PIXELS, MIN_PIXELS
from rewards import reads_boxes

EVALUATION_FILE = "evaluation.json"  # in a checkpoint of a run


@dataclass(frozen=True)
class Target:
    """A file to evaluate on, and what its samples are evaluated under."""

    name: str
    file: str
    image_root: str
    template: str
    measure: str  # "detection", or the name of a reward
    had_boxes: bool = False  # whether a bare list of four numbers was a box to the run, for a reward beside the measure

    @property
    def has_boxes(self) -> bool:
        """Whether a bare list of four numbers in this file is a box."""
        return self.had_boxes or self.measure == "detection" or reads_boxes(self.measure)


def settle(config: EvalConfig) -> tuple[EvalConfig, list[Target]]:
    """The config with everything filled in that was not given, and the files to evaluate on.

    A checkpoint of a run says in evaluation.json what it was evaluated under; for another model there are defaults.
    """
    path = Path(config.model) / EVALUATION_FILE
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    defaults = {
        "max_completion_tokens": 256,
        "max_pixels": MAX_PIXELS,
        "min_pixels": MIN_PIXELS,
        "box_space": "",
        "seed": 42,
    }
    open_options = {name for name in defaults if getattr(config, name) in (None, "")}
    config = replace(config, **{name: saved.get(name, defaults[name]) for name in open_options})
    if config.max_pixels < config.min_pixels:
        raise ValueError(f"max_pixels {config.max_pixels} is below min_pixels {config.min_pixels}")
    targets = (targets_of_mix if config.mix else targets_of_files)(config, saved)
    for target in targets:
        if target.measure != "detection":
            check_plugin(target.measure)
    return config, targets


def describe_protocol(config: EvalConfig, targets: Sequence[Target]) -> str:
    """What an evaluation runs under, in a few lines."""
    path = Path(config.model) / EVALUATION_FILE
    lines = [f"evaluating {config.model}" + (f" under {path}" if path.is_file() else "")]
    lines += [f"  {target.name}: template {target.template!r}, {target.measure}" for target in targets]
    limit = f", {config.limit} samples drawn with seed {config.seed}" if config.limit else ""
    pixels = f"{config.min_pixels:,} to {config.max_pixels:,} pixels"
    lines.append(f"  {pixels}, at most {config.max_completion_tokens} tokens{limit}")
    return "\n".join(lines)


def targets_of_files(config: EvalConfig, saved: dict) -> list[Target]:
    """The files of --data. What the command line leaves open follows from the run's file of the same name."""
    known, targets = saved.get("files", {}), []
    measures = {"rec": "iou", "detection": "detection", "text": config.reward}
    given = {"template": config.template, "measure": measures.get(config.task, "")}
    for path, name in zip(config.data, file_names(config.data), strict=True):
        found = {}
        for key, default in (("template", "rec"), ("measure", "iou")):
            values = {file[key] for file in known.values()} or {default}
            if given[key] or name in known or len(values) == 1:
                found[key] = given[key] or known.get(name, {}).get(key) or values.pop()
            else:
                option = "--template" if key == "template" else "--task"
                raise ValueError(
                    f"{name} is none of the run's files, {', '.join(known)}, which differ in {key}: give {option}"
                )
        had_boxes = known.get(name, {}).get("has_boxes", False)
        targets.append(Target(name, path, config.image_root or str(Path(path).parent), **found, had_boxes=had_boxes))
    return targets


def targets_of_mix(config: EvalConfig, saved: dict) -> list[Target]:
    """The evaluation files of a mix, or a data file of it that has none; the run's file of the same name says how."""
    root, known = config.image_root, saved.get("files", {})
    plain = DataFile("", "", root, config.template or "rec", ("iou",), (1.0,), eval_image_root=root)
    found = []
    for entry in read_mix(config.mix, plain):
        if not entry.eval_files:
            found.append((entry.file, entry.image_root, entry))
        for path in entry.eval_files:
            found.append((path, entry.eval_image_root or str(Path(path).parent), entry))
    names = file_names([path for path, _, _ in found])
    targets = []
    for name, (path, root, entry) in zip(names, found, strict=True):
        run = {"template": entry.template, "measure": entry.measure, "has_boxes": entry.has_boxes} | known.get(name, {})
        template = entry.template if config.template else run["template"]
        targets.append(Target(name, path, root, template, run["measure"], run["has_boxes"]))
    return targets
