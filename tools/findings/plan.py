"""From a finding to its jobs, and the data that they need beyond that of the toy."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

import toy
from infra.config import EvalConfig
from infra.terminal import hide_library_bars
from tools.findings.experiments import Arm, Finding, Scope
from tools.findings.measures import ANSWERS
from tools.findings.runner import ROOT, Job
from toy.model import build_model, build_processor
from toy.scenes import Recipe, loosened, write_split

START_RUN = (
    f"--template plain --response '{toy.RESPONSE}' --optimizer muon --schedule trapezoid --prompts_per_step 64 "
    f"--row_tokens 400 --max_completion_tokens 24 --min_pixels {toy.MIN_PIXELS} --max_pixels {toy.MAX_PIXELS} "
    "--eval_every 0 --save_every 0 --report False --image_root {data}"
)


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
    options, start = f"{finding.options} {arm.options}", None
    if arm.size:
        start = start_job(arm.size, scope)
        preset = {name: value for name, value in toy.PRESETS["train"].items() if name != "model"}
        options = f"--model {{start}}/second/checkpoints/step-{scope.second_steps:06d} {flags(preset)} {options}"
    return Job((scope.fill(f"{arm.command}.py {options} --seed {seed} --output_dir {{out}}"),), start)


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


def start_job(size: int, scope: Scope) -> Job:
    """The start of a model of another width: the recipe of docs/toy.md, shortened."""
    first = (
        f"sft.py --model {{data}}/untrained-{size} --data {{data}}/true.jsonl {START_RUN} --learning_rate 0.02 "
        "--warmup_steps <warmup> --steps <first_steps> --output_dir {out}/first"
    )
    second = (
        f"sft.py --model {{out}}/first/checkpoints/step-{scope.first_steps:06d} --data {{data}}/loose.jsonl "
        f"{START_RUN} --learning_rate 0.005 --steps <second_steps> --output_dir {{out}}/second"
    )
    return Job((scope.fill(first), scope.fill(second)), keeps_weights=True)


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


def prepare(finding: Finding, home: Path, scope: Scope) -> None:
    """Writes the data and the untrained models that the finding needs and that are not there yet."""
    data = home / "data"
    data.mkdir(parents=True, exist_ok=True)
    toy.ensure_data(map(str, toy.DETECTION_FILES.values() if finding.detection else toy.FILES.values()))
    loose = data / "train-loose.jsonl"
    if loose.name in str(finding.arms) and not loose.exists():
        write_loosened(toy.FILES["train"], loose)
    sizes = [arm.size for arm in finding.arms if arm.size]
    if sizes:
        write_start_data(data, sizes, scope.scenes)


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


def write_start_data(data: Path, sizes: Sequence[int], num_scenes: int) -> None:
    """What starts are made from: scenes with true and with loose boxes, and an untrained model of each width."""
    for name, seed, count in (("true", 10, num_scenes), ("loose", 11, num_scenes // 4)):
        if not (data / f"{name}.jsonl").exists():
            recipe = Recipe(relations=0.05, fewest=1, questions=4, loose=name == "loose")
            write_split(data, name, count, seed, recipe)
    processor = build_processor()
    hide_library_bars()
    for size in sizes:
        if (data / f"untrained-{size}").exists():
            continue
        model = sized_model(size, processor.tokenizer)
        model.save_pretrained(data / f"untrained-{size}")
        processor.save_pretrained(data / f"untrained-{size}")


def sized_model(size: int, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """The toy's untrained model, as wide as `size` says in place of 128; heads keep their width."""
    toy_model = build_model(tokenizer)
    config = toy_model.config
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size = size, 2 * size
    text.num_attention_heads = text.num_key_value_heads = size // 32
    vision.hidden_size, vision.intermediate_size, vision.num_heads = size * 3 // 4, size * 3 // 2, size // 32
    vision.out_hidden_size = size
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = toy_model.generation_config
    return model
