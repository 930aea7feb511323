"""Evaluate a model: greedy answers, one summary per data file, and a row per sample if asked for.

`python eval.py --model M --data F --image_root D` runs on all GPUs. A checkpoint of a run is evaluated under the
template, pixels, length and seed of that run, unless told otherwise. So with the run's --eval_limit as --limit, this
command prints the figures of the run's log.
"""

import sys

import toy
from infra.config import EvalConfig
from infra.options import config_from_command_line

if __name__ == "__main__":  # before torch is imported, so that --help and a mistyped option answer at once
    CONFIG = config_from_command_line(EvalConfig, sys.argv[1:], toy.PRESETS["eval"])

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data import read_samples
from infra.datacheck import check_data
from infra.evaluation import Protocol, answer_samples, handle_reward_errors, score_answers
from infra.parallel import World, compute_dtype, launch, process_group, shard_model
from infra.prompts import seeded_sample
from infra.protocol import Target, describe_protocol, settle
from infra.terminal import evaluation_bar, hide_library_bars, summary_line
from metrics.detection import OVDEVAL_GROUPS, ovdeval_overall
from metrics.summary import compare, summarize
from model.vlm import describe_processor, load_any


def main(config: EvalConfig) -> int:
    """Prints the summary as JSON; returns the exit code."""
    if (config.compare or config.predictions) and os.environ.get("RANK", "0") != "0":
        return 0  # no model is needed: the first process does it alone
    if config.compare:
        print(json.dumps(compare_files(*config.compare), indent=1))
        return 0
    if config.predictions:
        report(config, score_again(config))
        return 0
    config, targets = settle(config)
    with process_group(bf16=compute_dtype(config.dtype) == torch.bfloat16) as world:
        if world.first:
            print(describe_protocol(config, targets), file=sys.stderr)  # stdout holds the summary
        world = replace(world, draw_sharded=config.draw_sharded and world.size > 1)
        rows = answer(config, targets, world)
        for part in rows.values():
            handle_reward_errors(part, "stop", world)
        if world.first:
            report(config, rows)
    return 0


def answer(config: EvalConfig, targets: Sequence[Target], world: World) -> dict[str, list[dict]]:
    """The rows of each file, answered by the model."""
    sets = [
        read_samples(
            target.file,
            target.image_root,
            has_boxes=target.has_boxes,
            allow_outside_root=config.allow_outside_root,
        )
        for target in targets
    ]
    _, warnings = check_data(sets, progress=world.first)
    dtype = compute_dtype(config.dtype)
    if not sys.stderr.isatty():
        hide_library_bars()
    model, processor = load_any(
        config.model, max_pixels=config.max_pixels, min_pixels=config.min_pixels, dtype=dtype, empty=not world.first
    )
    if world.first:
        for line in (*(f"warning: {warning}" for warning in warnings), describe_processor(processor, config.box_space)):
            print(line, file=sys.stderr)
    model = shard_model(model, world, compute_dtype=dtype, trained=False)
    rows = {}
    for target, samples in zip(targets, sets, strict=True):
        protocol = Protocol(
            template=target.template,
            measure=target.measure,
            max_completion_tokens=config.max_completion_tokens,
            batch_size=config.batch_size,
            box_space=config.box_space,
            seed=config.seed,
        )
        chosen = seeded_sample(samples, config.limit, config.seed)
        with evaluation_bar(target.name, len(chosen), shown=world.first) as tell:
            rows[target.name] = answer_samples(model, processor, chosen, world, protocol, tell)
        if world.first:
            print(summary_line(target.name, summarize(rows[target.name])), file=sys.stderr)
    return rows


def score_again(config: EvalConfig) -> dict[str, list[dict]]:
    """The saved answers of --predictions, scored under their own measure or the one that --task names."""
    measure = {"": None, "rec": "iou", "detection": "detection", "text": config.reward}[config.task]
    rescored = {}
    for name, rows in saved_rows(config.predictions).items():
        rows = [row | {"measure": measure or row.get("measure", "iou")} for row in rows]
        rescored[name] = score_answers(rows)
    return rescored


def compare_files(first: str, second: str) -> dict[str, dict]:
    """Paired differences, second minus first, of each data file that both evaluated."""
    a, b = saved_rows(first), saved_rows(second)
    names = [name for name in a if name in b]
    if not names:
        raise ValueError(
            f"{first} evaluates {', '.join(a)} and {second} {', '.join(b)}: there is no common file to compare on"
        )
    return {name: compare(a[name], b[name]) for name in names}


def saved_rows(path: str) -> dict[str, list[dict]]:
    """The rows of each data file in a JSON file that --output wrote."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); a file that eval.py --output wrote is expected") from None
    except (KeyError, TypeError):
        raise ValueError(f'{path} holds no "rows"; a file that eval.py --output wrote is expected') from None


def report(config: EvalConfig, rows: dict[str, list[dict]]) -> None:
    """Prints the summary of each file, and writes it with the rows if --output says so."""
    summary = {name: summarize(part) for name, part in rows.items()}
    ovdeval = {name for sets in OVDEVAL_GROUPS.values() for name in sets}
    if ovdeval <= {name for name in summary if "nms_ap" in summary[name]}:  # the files are named as OVDEval's sets
        summary["overall"] = {"nms_ap": ovdeval_overall({name: summary[name]["nms_ap"] for name in ovdeval})}
    print(json.dumps(summary, indent=1))
    if config.output:
        text = json.dumps({"summary": summary, "rows": rows}, indent=1)
        Path(config.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    toy.ensure_data(CONFIG.data)
    launch(main, CONFIG)
