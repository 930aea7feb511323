"""What train.py and sft.py share: models and what of them is trained, optimizers, how a run stops and tells its size.

Nothing here knows rewards or losses.
"""

import math
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import ProcessorMixin

from data import Sample
from infra.memory import memory_estimate, row_budget
from infra.options import RunConfig, compute_dtype
from infra.parallel import World, all_sum, shard_model
from model.lora import add_adapters, choose_layers
from model.vlm import (
    build_prompt,
    describe_processor,
    is_within,
    load_model,
    projector_modules,
    trainable,
    vision_modules,
)

ONE_KEYSTROKE = 0.5  # seconds within which a second Ctrl-C is the first one heard twice


def load_policy(config: RunConfig, world: World) -> tuple[nn.Module, ProcessorMixin]:
    """The model to train, sharded, and its processor: fp32 masters of what is trained, the rest as it computes."""
    if config.prompts_per_step < world.size:
        raise ValueError(
            f"prompts_per_step {config.prompts_per_step} is below the {world.size} processes: each needs a prompt"
        )
    dtype = compute_dtype(config.dtype)
    model, processor = load_model(
        config.model,
        dtype=dtype if config.lora_rank else torch.float32,
        max_pixels=config.max_pixels,
        min_pixels=config.min_pixels,
        freeze_vision=config.freeze_vision,
        gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
        empty=config.dry_run or not world.first,
    )
    if world.first:
        tqdm.write(describe_processor(processor, config.box_space))
    choose_trained(model, config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    if config.dry_run:  # sizes are all it tells, and a config has them: no weights are loaded
        return model, processor
    return shard_model(model, world, compute_dtype=dtype), processor


def choose_trained(model: nn.Module, config: RunConfig) -> None:
    """Puts adapters on the model and freezes all else where LoRA is on; frees the projector where that is asked for."""
    if config.lora_rank:
        layers = choose_layers(model, config.lora_targets)
        vision, projector = vision_modules(model), projector_modules(model)
        if config.freeze_vision and (seen := [name for name in layers if is_within(name, vision)]):
            raise ValueError(f"lora_targets mean {seen[0]}, which freeze_vision freezes: leave one of the two out")
        if config.train_projector and (seen := [name for name in layers if is_within(name, projector)]):
            raise ValueError(f"lora_targets mean {seen[0]}, all of which train_projector trains: leave one out")
        model.requires_grad_(False)
        add_adapters(
            model,
            layers,
            rank=config.lora_rank,
            alpha=config.lora_alpha or 2 * config.lora_rank,
            dropout=config.lora_dropout,
            seed=config.seed,
        )
    if config.train_projector:
        for name in projector_modules(model):
            model.get_submodule(name).requires_grad_(True)


def load_reference(config: RunConfig, world: World) -> nn.Module:
    """The frozen model that the KL penalty measures from: the one training started with, in the compute dtype."""
    dtype = compute_dtype(config.dtype)
    model, _ = load_model(config.model, dtype=dtype, trust_remote_code=config.trust_remote_code, empty=not world.first)
    return shard_model(model.requires_grad_(False), world, compute_dtype=dtype, trained=False)


# ---- optimizer -----------------------------------------------------------------------------------------------------


def make_optimizers(model: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """AdamW over all trained parameters; or Muon over the matrices and AdamW, at a tenth of its rate, over the rest.

    The vision tower's are groups of their own where it has its own learning rate.
    """
    head = model.get_output_embeddings().weight
    embeddings = model.get_input_embeddings().weight
    named, modules = trainable(model), vision_modules(model) if config.vision_learning_rate else []
    vision = {id(p) for name, p in named if is_within(name, modules)}
    if config.vision_learning_rate and not vision:
        raise ValueError(
            f"vision_learning_rate is {config.vision_learning_rate} where nothing of the vision tower is trained: "
            "leave it out"
        )

    def groups(parameters: list[nn.Parameter], share: float = 1.0) -> list[dict]:
        own = [p for p in parameters if id(p) in vision]
        other = [p for p in parameters if id(p) not in vision]
        rates = [(other, config.learning_rate), (own, config.vision_learning_rate)]
        return [{"params": part, "lr": rate * share} for part, rate in rates if part]

    parameters = [parameter for _, parameter in named]
    adamw = {"weight_decay": config.weight_decay, "fused": parameters[0].is_cuda}
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(groups(parameters), **adamw)]
    matrices = [p for p in parameters if p.ndim == 2 and p is not head and p is not embeddings]
    taken = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in taken]
    muon = torch.optim.Muon(groups(matrices), weight_decay=config.weight_decay)
    return [muon, torch.optim.AdamW(groups(rest, 0.1), **adamw)] if rest else [muon]  # adapters are all matrices


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: str) -> float:
    """What the peak learning rate is multiplied by in a step counted from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    factors = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "trapezoid": min(1.0, 4 * (1 - progress)),
    }
    return factors[schedule]


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> float:
    """Scales every group's rate from the one it was made with; returns the first group's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return optimizers[0].param_groups[0]["lr"]


def seed_step(config: RunConfig, step: int, world: World) -> torch.Generator:
    """Seeds all that is random in a step, rewards included; returns the generator that completions are drawn with.

    A function of seed, step and rank: no random state to save, and no two ranks draw the same.
    """
    seed = (config.seed * 1_000_003 + step) * 65_537 + world.rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return torch.Generator(world.device).manual_seed(seed)


def total_steps(config: RunConfig, num_samples: int) -> int:
    """--steps, or the steps that --epochs come to."""
    steps = config.steps or math.ceil(config.epochs * num_samples / config.prompts_per_step)
    if config.warmup_steps >= steps:
        raise ValueError(f"warmup_steps {config.warmup_steps} leaves nothing of {steps} steps")
    return steps


@contextmanager
def timed(name: str, world: World) -> Iterator[dict[str, float]]:
    """Yields a dict that holds {"seconds_<name>": ...} once the block, and the device with it, is done."""
    result, start = {}, _clock(world)
    yield result
    result[f"seconds_{name}"] = _clock(world) - start


def _clock(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class StopSignal:
    """Set by Ctrl-C, SIGTERM or a time limit, so that the step in progress ends and is saved.

    A second Ctrl-C stops at once. A second SIGTERM means no more than the first: schedulers send it to every process,
    and `launch` passes it on.
    """

    def __init__(self, max_hours: float = 0.0, began: float = 0.0):
        self.received = 0.0  # when
        self.deadline = began + 3600 * max_hours if max_hours else math.inf
        self.before, self.longest = time.monotonic(), 0.0  # the end of the step before, the longest step so far
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        # A terminal and a launcher may both pass one Ctrl-C on.
        if self.received and number == signal.SIGINT and time.monotonic() - self.received > ONE_KEYSTROKE:
            raise KeyboardInterrupt
        self.received = self.received or time.monotonic()

    def agreed(self, world: World) -> bool:
        """Whether any rank was told to stop or would end its next step too late; asked once a step, all hear the same.

        Between two questions lie a step and, now and then, an evaluation and a save: the longest so far is reserved.
        """
        now = time.monotonic()
        self.longest, self.before = max(self.longest, now - self.before), now
        stop = self.received > 0 or now + self.longest > self.deadline
        return all_sum({"stop": float(stop)}, world, largest=True)["stop"] > 0


def describe_files(samples: Sequence[Sample], config: RunConfig, steps: int) -> list[str]:
    """A line per data file: how much it gives, and what is asked of it."""
    sizes = Counter(sample.file for sample in samples)
    shares = config.file_shares or [sizes[number] for number in range(len(config.tasks))]
    lines = []
    for number, task in enumerate(config.tasks):
        share = shares[number] / sum(shares)
        passes = steps * config.prompts_per_step * share / sizes[number]
        lines.append(
            f"  {task.name}: {sizes[number]:,} samples, {share:.1%} of each step, {passes:,.2f} passes; "
            f"template {task.template}, rewards {' '.join(task.rewards)}"
        )
    return lines


def describe_run(
    model: nn.Module,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    config: RunConfig,
    world: World,
    steps: int,
    *,
    completions: int,
    reference: bool,
) -> str:
    """What `--dry_run` prints: sizes, lengths of 64 prompts spread over the data, an estimate of memory."""
    chosen = samples[:: max(1, len(samples) // 64)]
    tasks = config.tasks
    prompts = [
        build_prompt(processor, sample, template=tasks[sample.file].template, box_space=config.box_space)
        for sample in chosen
    ]
    lengths = sorted(prompt["input_ids"].shape[1] for prompt in prompts)
    row_tokens = row_budget(config, model, world, reference=reference).tokens
    memory = memory_estimate(model, world, config, reference=reference, row_tokens=row_tokens)
    per_step = config.prompts_per_step
    trained, total = sum(p.numel() for _, p in trainable(model)), sum(p.numel() for p in model.parameters())
    lines = [
        f"{len(samples):,} samples; {per_step} prompts and {per_step * completions} completions a step; "
        f"{len(samples) / per_step:,.1f} steps an epoch; {steps:,} steps",
        *(describe_files(samples, config, steps) if len(tasks) > 1 else []),
        f"prompt tokens, images included, of {len(lengths)} samples: median {lengths[len(lengths) // 2]:,}, "
        f"longest {lengths[-1]:,}",
        f"{trained:,} of {total:,} parameters trained, {world.size} process(es)",
        f"estimated memory per process with rows of {row_tokens:,} tokens: {sum(memory.values()):.2f} GB",
        *(f"{size:10.2f} GB  {name}" for name, size in memory.items()),
    ]
    return "\n".join(lines)
