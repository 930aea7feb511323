"""The data files of a run: what is asked of each, and which files evaluate it.

One file is described by the plain options. Several are described by `--mix mix.json`, a list of objects:

    [{"file": "refcoco.jsonl", "image_root": "coco", "rewards": ["iou", "rec_format"], "share": 2,
      "eval_file": "refcoco_val.json"},
     {"file": "ovd.jsonl", "image_root": "coco", "template": "detection", "rewards": ["od_length", "format"],
      "share": 1}]

Only "file" is required; a key left out takes the value of the plain option.
"""

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from data import template_text
from infra.plugins import check_plugin
from rewards import reads_boxes


@dataclass(frozen=True)
class DataFile:
    """One data file and what a run does with it."""

    name: str  # what options, logs and metrics call it
    file: str
    image_root: str
    template: str
    rewards: tuple[str, ...]  # the first is the accuracy reward
    weights: tuple[float, ...]
    share: float = 0.0  # of each step, relative to the other files; 0 where the sizes of the files decide
    eval_files: tuple[str, ...] = ()
    eval_image_root: str = ""
    task: str = ""  # "detection" evaluates with COCO's metrics instead of the accuracy reward

    @property
    def has_boxes(self) -> bool:
        """Whether a bare list of four numbers in this file is a box."""
        return any(map(reads_boxes, self.rewards))

    @property
    def measure(self) -> str:
        """How an answer to this file is evaluated: "detection", or by its accuracy reward."""
        return self.task or self.rewards[0]


KEYS = ("file", "image_root", "template", "rewards", "weights", "share", "eval_file", "eval_image_root", "task")


def file_names(paths: Sequence[str]) -> list[str]:
    """What each file is called: its name without directory and suffix, or the whole path where two names are equal."""
    names = [Path(path).stem for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def read_mix(path: str, plain: DataFile) -> list[DataFile]:
    """The data files that a mix describes; `plain` holds the values for the keys that an entry leaves out."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--mix {path}: {error.strerror}; give the path of a JSON list of data files") from None
    except ValueError as error:
        raise ValueError(f"--mix {path}: not JSON: {error}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'--mix {path}: a list of objects is expected, as [{{"file": "a.jsonl"}}]')
    files = [_read_entry(entry, plain, f"--mix {path}, entry {number}") for number, entry in enumerate(entries, 1)]
    names = file_names([entry.file for entry in files])
    files = [DataFile(**{**_as_dict(entry), "name": name}) for entry, name in zip(files, names, strict=True)]
    shared = [entry.name for entry in files if entry.share]
    if shared and len(shared) < len(files):
        raise ValueError(f'--mix {path}: some entries have a "share" and some have none: give one to each, or to none')
    return files


def _as_dict(entry: DataFile) -> dict:
    return {field.name: getattr(entry, field.name) for field in fields(entry)}


def _read_entry(entry: dict, plain: DataFile, source: str) -> DataFile:
    for key in entry:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(KEYS)}"
            raise ValueError(f"{source}: unknown key {key!r}: {hint}")
    for key in ("file", "image_root", "template", "eval_image_root"):
        if not isinstance(entry.get(key, ""), str):
            raise ValueError(f'{source}: "{key}" is {entry[key]!r}: a text is expected')
    if not entry.get("file"):
        raise ValueError(f'{source}: it has no "file": the path of a data file is expected')
    rewards = _listed(entry.get("rewards", list(plain.rewards)), str, "rewards", source)
    default_weights = plain.weights if "rewards" not in entry else (1.0,) * len(rewards)
    weights = _listed(entry.get("weights", list(default_weights)), (int, float), "weights", source)
    eval_files = entry.get("eval_file", [])
    eval_files = [eval_files] if isinstance(eval_files, str) else eval_files
    file = DataFile(
        name="",
        file=entry["file"],
        image_root=entry.get("image_root", plain.image_root) or str(Path(entry["file"]).parent),
        template=entry.get("template", plain.template),
        rewards=tuple(rewards),
        weights=tuple(map(float, weights)),
        share=entry.get("share", 0.0),
        eval_files=tuple(_listed(eval_files, str, "eval_file", source)),
        eval_image_root=entry.get("eval_image_root", entry.get("image_root", plain.eval_image_root)),
        task=entry.get("task", ""),
    )
    if file.task not in ("", "detection"):
        raise ValueError(f'{source}: "task" is {file.task!r}: "detection" is expected, or no such key')
    if "share" in entry and not (isinstance(file.share, int | float) and 0 < file.share < math.inf):
        raise ValueError(
            f'{source}: "share" is {file.share!r}: a number above 0 is expected; drop a file that gives none'
        )
    try:
        check_file(file)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return file


def _listed(values: object, kind: type | tuple, key: str, source: str) -> list:
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f'{source}: "{key}" is {values!r}: a list is expected')
    return values


def check_file(file: DataFile) -> None:
    """Refuses an unknown template or reward, a reward named twice, and a wrong number of weights."""
    template_text(file.template)
    if not file.rewards:
        raise ValueError("rewards are empty: name at least one")
    for spec in file.rewards:
        check_plugin(spec)
    if len(set(file.rewards)) < len(file.rewards):
        raise ValueError(f"rewards {' '.join(file.rewards)} name one twice: give it a weight instead")
    names = [spec.rpartition(":")[2] for spec in file.rewards]
    if len(set(names)) < len(names):
        raise ValueError(f"rewards {' '.join(file.rewards)} end in one name, which the log cannot tell apart")
    if len(file.weights) != len(file.rewards):
        raise ValueError(f"{len(file.weights)} weights for {len(file.rewards)} rewards: give one each")
    if not all(map(math.isfinite, file.weights)):
        raise ValueError(f"weights are {list(file.weights)}: finite numbers are expected")
