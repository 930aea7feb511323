"""Evaluation: greedy answers on held-out samples, scored by the parser and the overlap that the reward uses.

`python eval.py --model M --data F --image_root D` runs on all GPUs and writes one JSON: a summary and a row per sample.
train.py and sft.py call `evaluate_sets` on the model in training. A checkpoint of a run is evaluated under that run's
prompt, pixels and length, unless told otherwise, so a number in its log is the number printed here.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import ProcessorMixin
from transformers.hf_argparser import HfArg

import toy
from data import BadSample, Sample, answer_boxes, template_text
from infra.options import RunConfig, check_per_file, compute_dtype, file_names, parse_options
from infra.parallel import World, all_gather, drawing, launch, process_group, shard_model
from infra.prompts import load_samples, seeded_sample
from infra.run import seed_step
from infra.runlog import RunLog
from metrics.detection import OVDEVAL_GROUPS, coco_map, greedy_precision_recall, nms_ap, ovdeval_overall
from model.lora import load_any
from model.vlm import (
    MAX_PIXELS,
    banned_token_ids,
    build_prompt,
    describe_processor,
    eos_token_ids,
    to_image_box,
)
from rewards import average_precision, checked_reward, first_box, iou, load_reward, parse_boxes, reads_boxes
from rollout import sample_completions


@dataclass(frozen=True)
class Config:
    model: str = HfArg(
        default=str(toy.MODEL), help="hub name or directory of the model or adapter; the toy's start by default"
    )
    data: list[str] = HfArg(default_factory=list, help="data files, VLM-R1's evaluation JSON or training JSONL")
    image_root: list[str] = HfArg(default_factory=list, help="image directory of each data file, or one for all")
    allow_outside_root: bool = HfArg(
        default=False, help="use images that .., a link or an absolute path leads out of their image root to"
    )
    task: Literal["rec", "detection", "text"] = HfArg(
        default="rec", help="rec: one box per answer; detection: lists of boxes; text: the mean of --reward"
    )
    reward: str = HfArg(default="default", help="reward of task text, where the data names none")
    template: str = HfArg(default="rec", help="prompt template, a name of data.TEMPLATES or a text with {question}")
    file_tasks: list[str] = HfArg(
        default_factory=list, help="instead of --task: rec, detection or the name of a reward, one for each data file"
    )
    file_templates: list[str] = HfArg(default_factory=list, help="instead of --template: one for each data file")
    limit: int = HfArg(default=0, help="evaluate this many samples, drawn with --seed; 0 for all")
    seed: int = HfArg(default=42, help="seed of that draw; 42 and limit 2000 are VLM-R1's protocol")
    max_completion_tokens: int = HfArg(default=256, help="tokens of an answer at most")
    max_pixels: int = HfArg(default=MAX_PIXELS, help="pixels of an image at most; the same as in training")
    min_pixels: int = HfArg(default=3136, help="pixels of an image at least")
    box_space: Literal["", "pixels", "thousand"] = HfArg(
        default="", help="where boxes live: pixels of the resized image, or 0..1000; the family's own by default"
    )
    trust_remote_code: bool = HfArg(default=False, help="run the code that a checkpoint brings along")
    batch_size: int = HfArg(default=32, help="answers decoded together per process")
    dtype: Literal["auto", "bf16", "fp32"] = HfArg(default="auto", help="compute in; auto is bf16 on a GPU")
    draw_sharded: bool = HfArg(default=False, help="answer from sharded layers, for a model that fits no single GPU")
    output: str = HfArg(default="", help="write summary and rows to this JSON file")
    predictions: str = HfArg(default="", help="score the answers of such a file again, without a model")
    compare: list[str] = HfArg(
        default_factory=list, help="two such files: print the paired differences and their intervals"
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_completion_tokens", "min_pixels"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.limit < 0:
            raise ValueError(f"limit is {self.limit}: it must not be negative")
        load_reward(self.reward)
        if len(self.compare) not in (0, 2):
            raise ValueError(f"compare names {len(self.compare)} files: two are compared")
        if not self.data and not self.predictions and not self.compare:
            raise ValueError("data is empty: name at least one file to evaluate on")
        if len(self.image_root) not in (0, 1, len(self.data)):
            raise ValueError(
                f"{len(self.image_root)} image_root for {len(self.data)} data files: give one for all or one each"
            )
        for template in (self.template, *self.file_templates):
            template_text(template)
        for measure in self.measures(len(self.file_tasks)):
            if measure != "detection":
                load_reward(measure)
        if self.data:
            check_per_file(self.data, file_tasks=self.file_tasks, file_templates=self.file_templates)

    def measures(self, num_files: int) -> list[str]:
        """How the answers to each file are scored, for `score`: "detection", or the name of a reward."""
        one = self.reward if self.task == "text" else self.task
        if len(self.file_tasks) not in (0, num_files):
            raise ValueError(
                f"{len(self.file_tasks)} file_tasks for {num_files} files: give one for each, in their order"
            )
        return ["iou" if task == "rec" else task for task in self.file_tasks or [one] * num_files]


def greedy_rows(
    model: nn.Module,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    world: World,
    *,
    template: str,
    max_completion_tokens: int,
    batch_size: int,
    reward: str = "iou",
    box_space: str = "",
    reward_seconds: float = 0.0,
) -> list[dict]:
    """A row per sample with its greedy answer and what it is worth, in their order; every rank answers its share."""
    tokenizer = processor.tokenizer
    eos, banned = eos_token_ids(model, processor), banned_token_ids(model, processor)
    mine = list(enumerate(samples))[world.rank :: world.size]
    rows = []
    with drawing(model, world):
        starts = range(0, len(mine), batch_size)
        for start in tqdm(starts, "evaluating", delay=5, leave=False, disable=not world.first):
            prompts = {}
            for number, sample in mine[start : start + batch_size]:
                try:
                    prompts[number] = build_prompt(processor, sample, template=template, box_space=box_space)
                except BadSample as error:
                    rows.append({"index": number, "id": sample.id, "bad_sample": str(error)})
            if not prompts:
                continue
            answers = sample_completions(
                model,
                list(prompts.values()),
                1,
                max_new_tokens=max_completion_tokens,
                eos_ids=eos,
                temperature=0,
                banned_ids=banned,
            )
            for (number, prompt), [ids] in zip(prompts.items(), answers, strict=True):
                row = {
                    "index": number,
                    "id": prompt.sample.id,
                    "question": prompt.sample.question,
                    "images": prompt.sample.images,
                    "answer": prompt.sample.answer,
                    "completion": tokenizer.decode(ids, skip_special_tokens=True),
                    "truncated": int(ids[-1]) not in eos,
                    "truth": prompt.answer,
                    "has_boxes": prompt.sample.has_boxes,
                    "method": prompt.sample.reward,
                    "template": template,
                    "family": model.config.model_type,
                    "box_space": box_space,
                    "image_size": prompt.image_size,
                    "input_size": prompt.input_size,
                }
                rows.append(row | score(row, reward, reward_seconds))
    return sorted(all_gather(rows, world), key=lambda row: row["index"])


def score(row: dict, reward: str, reward_seconds: float = 0.0) -> dict:
    """What an answer is worth, with its boxes in pixels of the original image: a function of the row alone.

    The overlap is taken in the model's space, where the two axes are scaled but the overlap is the same.
    """
    text, name = row["completion"], row["method"] or reward

    def in_image(box: list[float] | None) -> list[float] | None:
        sizes = row["image_size"], row["input_size"]
        return box and to_image_box(box, *sizes, row["family"], row.get("box_space"))

    if reward == "detection":
        both = {"predicted": parse_boxes(text), "true": parse_boxes(row["truth"])}
        moved = {key: [(in_image(box), label) for box, label in items or []] for key, items in both.items()}
        return moved | {"unread": both["predicted"] is None}
    boxes = answer_boxes(row["truth"]) if row["has_boxes"] else None
    if name not in ("iou", "giou") or not boxes or len(boxes) > 1:
        value, reason = checked_reward(name, text, row["truth"], reward_seconds)
        return {"reward": value} | ({"reward_error": f"reward {name} {reason}"} if reason else {})
    # A base model is not asked for tags, so its box may stand anywhere; where they are asked for, it may not.
    untagged = "<answer>" not in template_text(row["template"]) + text
    box = first_box(text, anywhere=untagged)
    return {"box": in_image(box), "iou": iou(box, boxes[0]) if box else 0.0}


def answer_reward_errors(rows: Sequence[dict], on_reward_error: str, world: World) -> None:
    """Stops, on every rank as all have all rows, or warns where a reward gave no number and counts 0."""
    wrong = [row for row in rows if "reward_error" in row]
    if not wrong:
        return
    first = f"sample {wrong[0]['id']}: {wrong[0]['reward_error']}, for {wrong[0]['completion'][:200]!r}"
    if on_reward_error == "stop":
        raise ValueError(f"{first}; {len(wrong)} of {len(rows)} answers have no reward: mend it")
    if world.first:
        tqdm.write(f"warning: {len(wrong)} of {len(rows)} answers score 0, the first: {first}")


def summarize(rows: Sequence[dict]) -> dict[str, float]:
    """The figures of what the rows hold: overlaps of single boxes, detections, rewards; and what went wrong."""
    good = [row for row in rows if "bad_sample" not in row]
    if not good:
        raise ValueError(
            f"none of {len(rows)} samples could be read; the first: {rows[0]['bad_sample'] if rows else 'none'}"
        )
    summary = {"samples": len(good), "bad_samples": len(rows) - len(good)}
    boxed = [row for row in good if "iou" in row]
    if boxed:
        overlaps = np.array([row["iou"] for row in boxed])
        low, high = bootstrap_interval(overlaps > 0.5)
        summary |= {
            "accuracy": float((overlaps > 0.5).mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            "accuracy_75": float((overlaps > 0.75).mean()),
            "mean_iou": float(overlaps.mean()),
            "unparsed": float(np.mean([row["box"] is None for row in boxed])),
        }
    listed = [(row["predicted"], row["true"]) for row in good if "predicted" in row]
    if listed:
        unread = float(np.mean([row["unread"] for row in good if "predicted" in row]))
        summary |= {**coco_map(listed), **greedy_precision_recall(listed), **nms_ap(listed), "unparsed": unread}
    others = np.array([row["reward"] for row in good if "reward" in row])
    if len(others):
        low, high = bootstrap_interval(others)
        summary |= {"reward": float(others.mean()), "reward_low": low, "reward_high": high}
    return summary | {"truncated": float(np.mean([row["truncated"] for row in good]))}


def evaluate_sets(
    model: nn.Module,
    processor: ProcessorMixin,
    eval_sets: dict[str, list[Sample]],
    step: int,
    config: RunConfig,
    world: World,
    log: RunLog,
) -> float | None:
    """Evaluates a model in training on each set, prints and logs the figures; the first set's headline comes back.

    Each under the template and the accuracy reward of the data file that its samples are from, or evaluated like.
    """
    score = None
    seed_step(config, step, world)  # a reward may be random
    for name, samples in eval_sets.items():
        task = config.tasks[samples[0].file]
        rows = greedy_rows(
            model,
            processor,
            samples,
            world,
            template=task.template,
            max_completion_tokens=config.max_completion_tokens,
            batch_size=config.eval_batch_size,
            reward=task.rewards[0],
            box_space=config.box_space,
            reward_seconds=config.reward_seconds,
        )
        answer_reward_errors(rows, config.on_reward_error, world)
        summary = summarize(rows)
        score = summary[headline(summary)] if score is None else score
        log.write("eval.jsonl", step, {f"eval/{name}/{key}": value for key, value in summary.items()})
        log.say(f"step {step}, {name}: " + "  ".join(f"{key} {value:.4g}" for key, value in summary.items()))
    return score


def headline(summary: dict[str, float]) -> str:
    """The name of the figure that says how good a model is: it decides which checkpoint is the best."""
    return next(name for name in ("mean_iou", "map", "reward") if name in summary)


def bootstrap_interval(values: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean over samples, by resampling them."""
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def compare(first: Sequence[dict], second: Sequence[dict]) -> dict[str, float]:
    """Paired differences, second minus first, over the samples both answered, with their 95% intervals."""
    earlier = {(row["id"], row["question"]): row for row in first if "bad_sample" not in row}
    pairs = [(earlier[key], row) for row in second if (key := (row["id"], row.get("question"))) in earlier]
    if not pairs:
        raise ValueError("no sample of one file is in the other: were they made from the same data?")
    result = {"samples": len(pairs)}
    measures = {  # name: (what a row must hold, what it is worth)
        "accuracy": ("iou", lambda row: row["iou"] > 0.5),
        "mean_iou": ("iou", lambda row: row["iou"]),
        "image_ap": ("predicted", _image_ap),
        "reward": ("reward", lambda row: row["reward"]),
    }
    for name, (key, measure) in measures.items():
        values = [float(measure(b)) - float(measure(a)) for a, b in pairs if key in a and key in b]
        if values:
            low, high = bootstrap_interval(np.array(values))
            result |= {name: float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}
    return result


def _image_ap(row: dict) -> float:
    predicted, true = row["predicted"], row["true"]
    return average_precision(predicted, true) if predicted and true else float(not predicted and not true)


def answer_sets(config: Config, world: World) -> dict[str, list[dict]]:
    """Rows of each data file, by the file's name: answered by the model, or read back from --predictions."""
    if config.predictions:
        saved = json.loads(Path(config.predictions).read_text(encoding="utf-8"))["rows"]
        return {
            name: [row | score(row, measure) if "bad_sample" not in row else row for row in rows]
            for (name, rows), measure in zip(saved.items(), config.measures(len(saved)), strict=True)
        }
    measures = config.measures(len(config.data))
    sets = load_samples(
        config.data,
        config.image_root,
        has_boxes=[measure == "detection" or reads_boxes(measure) for measure in measures],
        allow_outside_root=config.allow_outside_root,
        progress=world.first,
    )
    dtype = compute_dtype(config.dtype)
    model, processor = load_any(
        config.model,
        max_pixels=config.max_pixels,
        min_pixels=config.min_pixels,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        empty=not world.first,
    )
    if world.first:  # not on stdout, which holds the summary
        print(describe_processor(processor, config.box_space), file=sys.stderr)
    model = shard_model(model, world, compute_dtype=dtype, trained=False)
    templates = config.file_templates or [config.template] * len(config.data)
    return {
        name: greedy_rows(
            model,
            processor,
            seeded_sample(samples, config.limit, config.seed),
            world,
            template=template,
            batch_size=config.batch_size,
            max_completion_tokens=config.max_completion_tokens,
            reward=measure,
            box_space=config.box_space,
        )
        for name, samples, template, measure in zip(file_names(config.data), sets, templates, measures, strict=True)
    }


def main(config: Config) -> None:
    if config.compare:
        first, second = (json.loads(Path(path).read_text(encoding="utf-8"))["rows"] for path in config.compare)
        print(json.dumps({name: compare(first[name], second[name]) for name in first if name in second}, indent=1))
        return
    with process_group(bf16=compute_dtype(config.dtype) == torch.bfloat16) as world:
        world = replace(world, draw_sharded=config.draw_sharded and world.size > 1)
        rows = answer_sets(config, world)
        for part in rows.values():
            answer_reward_errors(part, "stop", world)
        summary = {name: summarize(part) for name, part in rows.items()}
        ovdeval = {name for sets in OVDEVAL_GROUPS.values() for name in sets}
        if ovdeval <= {name for name in summary if "nms_ap" in summary[name]}:  # the files are named as its sets are
            summary["overall"] = {"nms_ap": ovdeval_overall({name: summary[name]["nms_ap"] for name in ovdeval})}
        if world.first:
            print(json.dumps(summary, indent=1))
            if config.output:
                Path(config.output).write_text(
                    json.dumps({"summary": summary, "rows": rows}, indent=1), encoding="utf-8"
                )


def run_options(given: dict) -> dict:
    """What a checkpoint of a run of ours was trained under and evaluation shares; nothing for any other model."""
    path = Path(given["model"]).resolve().parent.parent / "config.json"  # of OUT/checkpoints/step-000100, or OUT/best
    if not path.is_file() or "options" not in (saved := json.loads(path.read_text())):
        return {}
    names = ("template", "max_completion_tokens", "max_pixels", "min_pixels", "box_space")
    shared = {name: saved["options"][name] for name in names if name in saved["options"]}
    return shared | _options_of_files(saved.get("files", {}), given)


def _options_of_files(known: dict[str, dict], given: dict) -> dict:
    """What a run of several files asked of those that are evaluated now, told by their names."""
    found, names = {}, file_names(given.get("data", []))
    for what, each, *one in (("template", "file_templates", "template"), ("reward", "file_tasks", "task", "reward")):
        values = {file[what] for file in known.values()}
        if len(values) < 2 or given.keys() & {each, *one}:
            found |= {"template": values.pop()} if what == "template" and len(values) == 1 else {}
            continue
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"{unknown[0]} is none of the files of the run, {', '.join(known)}, which differ in {what}: "
                f"give --{one[0]} or --{each}"
            )
        found[each] = [known[name][what] for name in names]
    return found


if __name__ == "__main__":
    launch(main, parse_options(Config, sys.argv[1:], toy.PRESETS["eval"], run_options))
