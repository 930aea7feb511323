"""What `--dry_run` prints: the size of the run, its data, the lengths of its prompts, the memory it needs."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import ProcessorMixin

from data import Sample
from infra.budget import row_budget
from infra.config import RunConfig
from infra.datacheck import draw_samples, statistics_text
from infra.estimate import RowSize, memory_estimate
from infra.parallel import compute_dtype, process_group
from infra.policy import load_policy
from infra.prompts import load_run_samples
from infra.run import total_steps
from model.vlm import Prompt, build_prompt, check_special_tokens, trainable

NUM_PROMPTS = 64  # prompts built to see their lengths, spread over the data


def print_plan(config: RunConfig, *, completions: int) -> int:
    """Prints what a run would do and need, without loading any weights; returns the exit code."""
    bf16 = compute_dtype(config.dtype) == torch.bfloat16
    with process_group(bf16=bf16, shard_within_node=config.shard_within_node) as world:
        data = load_run_samples(config, world)
        samples = data.training
        model, processor = load_policy(config, world)
        check_special_tokens(processor, samples)
        steps, per_step = total_steps(config, len(samples)), config.prompts_per_step
        reference = getattr(config, "needs_reference_model", False)
        prompts = some_prompts(samples, processor, config)
        tokens = row_budget(model, world, config, reference=reference).tokens  # of the first step, if auto
        row = widest_row(prompts, model.config.image_token_id, tokens, math.ceil(per_step / world.size))
        memory = memory_estimate(model, world, config, reference=reference, row=row)
        trained, total = sum(p.numel() for _, p in trainable(model)), sum(p.numel() for p in model.parameters())
        lines = [
            f"{len(samples):,} samples; {per_step} prompts and {per_step * completions} completions a step; "
            f"{len(samples) / per_step:,.1f} steps an epoch; {steps:,} steps",
            *describe_files(samples, config, steps),
            *statistics_of_files(samples, config, data.sizes),
            describe_lengths(prompts),
            f"{trained:,} of {total:,} parameters trained, {world.size} process(es)",
            *describe_memory(memory, row),
        ]
        if world.first:
            picture = Path(config.output_dir or "runs") / "samples.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            draw_samples(samples, picture)
            print("\n".join([*lines, f"eight samples with their boxes: {picture}"]))
    return 0


def describe_files(samples: Sequence[Sample], config: RunConfig, steps: int) -> list[str]:
    """A line per data file of a mix: how much it gives, and what is asked of it."""
    if len(config.files) == 1:
        return []
    sizes = Counter(sample.file for sample in samples)
    shares = config.shares or [sizes[number] for number in range(len(config.files))]
    lines = []
    for number, file in enumerate(config.files):
        share = shares[number] / sum(shares)
        passes = steps * config.prompts_per_step * share / sizes[number]
        lines.append(
            f"  {file.name}: {sizes[number]:,} samples, {share:.1%} of each step, {passes:,.2f} passes; "
            f"template {file.template}, rewards {' '.join(file.rewards)}"
        )
    return lines


def statistics_of_files(samples: Sequence[Sample], config: RunConfig, sizes: dict[str, tuple[int, int]]) -> list[str]:
    """What each data file holds: images, boxes, where the boxes lie."""
    lines = []
    for number, file in enumerate(config.files):
        text = statistics_text([sample for sample in samples if sample.file == number], sizes)
        lines += [f"{file.name}:", *(f"  {line}" for line in text.splitlines())]
    return lines


def some_prompts(samples: Sequence[Sample], processor: ProcessorMixin, config: RunConfig) -> list[Prompt]:
    """The prompts of samples spread over the data."""
    return [
        build_prompt(processor, sample, template=config.files[sample.file].template, box_space=config.box_space)
        for sample in samples[:: max(1, len(samples) // NUM_PROMPTS)]
    ]


def describe_lengths(prompts: Sequence[Prompt]) -> str:
    """The lengths of these prompts, images included."""
    lengths = sorted(prompt["input_ids"].shape[1] for prompt in prompts)
    return (
        f"prompt tokens, images included, of {len(lengths)} samples: median {lengths[len(lengths) // 2]:,}, "
        f"longest {lengths[-1]:,}"
    )


def widest_row(prompts: Sequence[Prompt], image_token: int, tokens: int, most: int) -> RowSize:
    """The row that needs the most memory: the longest prompts, as many as fit and at most `most` of them."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    images = max(int((prompt["input_ids"] == image_token).sum()) for prompt in prompts)
    number = max(1, min(most, tokens // longest))
    return RowSize(tokens=tokens, prompts=number, image_tokens=number * images)


def describe_memory(memory: dict[str, dict[str, float]], row: RowSize) -> list[str]:
    """The peak of the memory, which is the larger of drawing's and learning's, and what it consists of."""
    sums = {phase: sum(terms.values()) for phase, terms in memory.items()}
    lines = [
        f"estimated memory per process with rows of {row.tokens:,} tokens, {row.image_tokens:,} of them of images: "
        f"{max(sums.values()):.2f} GB"
    ]
    for phase, terms in memory.items():
        lines += [f"  {phase}: {sums[phase]:.2f} GB", *(f"{size:12.2f} GB  {name}" for name, size in terms.items())]
    return lines
