"""From a finding to its jobs, and the data that they need beyond that of the toy."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

import toy
from infra.config import EvalConfig
from tools.findings.experiments import Arm, Finding, Scope
from tools.findings.measures import ANSWERS
from tools.findings.runner import ROOT, Job
from toy.scenes import loosened


def plan(finding: Finding, scope: Scope) -> dict[str, list[Job]]:
    """The job of each seed for each arm; arms that are not trained have the same job for all."""
    return {arm.name: [job_of(finding, arm, seed, scope) for seed in scope.seeds] for arm in finding.arms}


def job_of(finding: Finding, arm: Arm, seed: int, scope: Scope) -> Job:
    """What trains and measures an arm."""
    if finding.detection:
        return _detection_job(arm, seed, scope)
    if not arm.command:
        files = " ".join(shown(toy.FILES[name]) for name in ("test", "pairs", "relations"))
        return Job((scope.fill(f"eval.py --data {files} --limit <limit> --output {{out}}/{ANSWERS}"),))
    options = f"{finding.options} {arm.options}"
    if arm.size:  # with --model, the toy's options are no longer the defaults
        options = f"{flags(toy.PRESETS['train'] | {'model': toy.STARTS[arm.size]})} {options}"
    return Job((scope.fill(f"{arm.command}.py {options} --seed {seed} --output_dir {{out}}"),))


def _detection_job(arm: Arm, seed: int, scope: Scope) -> Job:
    files = {name: shown(path) for name, path in toy.DETECTION_FILES.items()}
    template = {"template": toy.AT_ONCE_TEMPLATE} if arm.at_once else {}
    options = toy.DETECTION_OPTIONS | template
    known = {field.name for field in fields(EvalConfig)} - {"data", "model"}
    answering = flags({name: value for name, value in options.items() if name in known})
    evaluation = f"--data {files['test']} --task detection --limit <limit> --batch_size 64 --output {{out}}/{ANSWERS}"
    if not arm.command:
        return Job((scope.fill(f"eval.py --model {shown(toy.DETECTION)} {answering} {evaluation}"),))
    training = {name: value for name, value in options.items() if name not in ("steps", "eval_data")}
    training |= {"eval_every": 0, "save_every": 0, "report": False}
    line = f"train.py {flags(training)} --steps <detection_steps> {arm.options} --seed {seed} --output_dir {{out}}"
    checkpoint = f"{{out}}/checkpoints/step-{scope.detection_steps:06d}"
    lines = (line.replace("<easy>", files["easy"]), f"eval.py --model {checkpoint} {answering} {evaluation}")
    return Job(tuple(map(scope.fill, lines)))


def shown(path: Path) -> str:
    """The path as a command in the repository writes it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def flags(options: Mapping[str, object]) -> str:
    """The options as a command line."""
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        texts = [shown(Path(text)) if str(text).startswith(str(ROOT)) else str(text) for text in values]
        words += [f"--{name}", *map(shlex.quote, texts)]
    return " ".join(words)


# ---- data ----------------------------------------------------------------------------------------------------------


def prepare(finding: Finding, home: Path) -> None:
    """Writes the data that the finding needs and that is not there yet."""
    data = home / "data"
    data.mkdir(parents=True, exist_ok=True)
    toy.ensure_data(map(str, toy.DETECTION_FILES.values() if finding.detection else toy.FILES.values()))
    loose = data / "train-loose.jsonl"
    if loose.name in str(finding.arms) and not loose.exists():
        write_loosened(toy.FILES["train"], loose)


def write_loosened(source: Path, target: Path) -> None:
    """The same questions about the same images, each box loose as in the data of the toy's start."""
    rng, lines = np.random.default_rng(5), []
    for line in source.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        answer = record["conversations"][1]
        answer["value"] = json.dumps(loosened(rng, tuple(json.loads(answer["value"]))))
        lines.append(json.dumps(record) + "\n")
    partial = target.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.rename(target)
