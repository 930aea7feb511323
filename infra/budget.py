"""How many tokens a packed row may have: as many as the GPU takes (`--row_tokens auto`), found by measuring.

The gradient does not depend on how a step is cut into rows, only time and memory do. The first step takes a row that
the estimate calls safe. Each learning pass then shows how many bytes a token of a row needs, and from the second step
on rows fill 90% of what the GPU has left. All ranks take the row of the one that has the least room.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from infra.config import RunConfig
from infra.estimate import PIXELS, RowSize, device_memory_gb, memory_estimate, peak_memory_gb
from infra.parallel import World, all_max
from infra.rows import Row
from model.vlm import trainable

ON_CPU = 8192  # tokens of a row where nothing is measured
LEAST, MOST = 1024, 65_536  # the bounds of a row that is chosen here
SAFE, FILLED = 0.6, 0.9  # of the GPU's memory, by the estimate and by measuring
RECENT = 10  # passes whose needs count


class DeviceMemory:
    """Bytes on a GPU, as torch's allocator counts them."""

    def __init__(self, device: torch.device):
        self.device = device

    def held(self) -> int:
        """Bytes in tensors now."""
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """The most bytes in tensors since the last `reset`."""
        return torch.cuda.max_memory_allocated(self.device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def limit(self) -> int:
        """The bytes that tensors could take: what other programs, NCCL and CUDA itself hold is not among them."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)


class RowBudget:
    """The tokens of a packed row, which follow what passes have needed if `memory` is given, and are fixed if not."""

    def __init__(self, tokens: int, world: World, gradients: int = 0, memory: DeviceMemory | None = None):
        """`tokens`: of the first step's rows; `gradients`: bytes that the first backward pass adds for good."""
        self.tokens, self.world, self.gradients, self.memory = tokens, world, gradients, memory
        self.needs: deque[float] = deque(maxlen=RECENT)  # bytes of a row's token in each pass
        self.highest = 0  # the peak before the last reset
        self.widest = 0  # tokens of the widest row in the pass that is measured; 0 if none is

    def peak_gb(self) -> float:
        """The most memory in use since the run began."""
        return max(self.highest / 1e9, peak_memory_gb(self.world.device))

    def choose(self) -> int:
        """The tokens of a row in this step, the same on every rank."""
        if self.memory is not None:
            mine = self.tokens
            if self.needs:
                room = FILLED * self.memory.limit() - self.memory.held() - self.gradients
                mine = min(MOST, max(LEAST, int(room / max(self.needs))))
            self.tokens = least_of_all(mine, self.world)
        return self.tokens

    def begin(self, rows: Sequence[Row]) -> None:
        """Measures from here what a learning pass over these rows needs.

        A row far below the budget shows little: what every row needs would count as what its few tokens need.
        """
        widest = max(map(tokens_of, rows), default=0)
        if self.memory is not None and widest >= self.tokens / 2:
            self.widest, self.highest = widest, max(self.highest, self.memory.peak())
            self.memory.reset()
            self.before = self.memory.held()

    def end(self) -> None:
        """Ends the measurement, before the optimizer adds memory of its own."""
        if self.widest:
            self.needs.append((self.memory.peak() - self.before - self.gradients) / self.widest)
            self.widest = 0


def least_of_all(number: int, world: World) -> int:
    """The least of the ranks' numbers."""
    return -int(all_max({"least": -number}, world)["least"])


def tokens_of(row: Row) -> int:
    """How many tokens a packed row has."""
    completions = sum(len(ids) for group in row.completions for ids in group)
    return completions + sum(prompt["input_ids"].shape[1] for prompt in row.prompts)


def row_budget(model: nn.Module, world: World, config: RunConfig, *, reference: bool) -> RowBudget:
    """The budget that a run begins with, resumed or not.

    The rows that a run had found before a resume are not taken over: with fewer GPUs or without gradient checkpointing
    they might not fit, at this resume and at each one after it.
    """
    if config.row_tokens != "auto":
        return RowBudget(config.row_tokens, world)
    if world.device.type != "cuda":
        return RowBudget(ON_CPU, world)
    memory = DeviceMemory(world.device)
    gradients = sum(4 * p.numel() for _, p in trainable(model)) // world.num_shards
    tokens = safe_row(model, world, config, reference=reference, limit=memory.limit())
    return RowBudget(tokens, world, gradients, memory)


def safe_row(model: nn.Module, world: World, config: RunConfig, *, reference: bool, limit: int) -> int:
    """The tokens, between LEAST and ON_CPU, with which the estimate fills a safe part of the GPU.

    They count as tokens of images, which need the most, since the tower keeps activations of its own.
    """
    needed = [estimated_gb(model, world, config, reference, n)["learning"] for n in (LEAST, 2 * LEAST)]
    extra = (SAFE * limit / 1e9 - needed[0]) / (needed[1] - needed[0]) * LEAST
    return least_of_all(min(ON_CPU, max(LEAST, LEAST + int(extra))), world)


def estimated_gb(model: nn.Module, world: World, config: RunConfig, reference: bool, tokens: int) -> dict[str, float]:
    """GB of a step's two phases with rows of that many tokens, all of them of images."""
    row = RowSize(tokens=tokens, prompts=1, image_tokens=tokens)
    memory = memory_estimate(model, world, config, reference=reference, row=row)
    return {phase: sum(terms.values()) for phase, terms in memory.items()}


def out_of_memory(model: nn.Module, world: World, config: RunConfig, *, reference: bool, tokens: int) -> str:
    """What to say when the GPU has no memory left: what a step needs by the estimate, and what to lower."""
    image = min(tokens, config.max_pixels // PIXELS)
    now = estimated_gb(model, world, config, reference, tokens)
    lines = [
        f"the GPU ran out of memory. By the estimate drawing needs {now['drawing']:.1f} GB and learning, with rows of "
        f"{tokens:,} tokens, {now['learning']:.1f} GB; this GPU has {device_memory_gb(world.device):.1f} GB."
    ]
    if now["drawing"] > now["learning"]:
        lines.append("Lower --draw_batch_size, draw from shards with --draw_sharded on several GPUs,")
    elif tokens > LEAST:
        half = estimated_gb(model, world, config, reference, tokens // 2)["learning"]
        lines.append(f"Give --row_tokens {tokens // 2} ({half:.1f} GB),")
    if not config.gradient_checkpointing:
        less = estimated_gb(model, world, replace(config, gradient_checkpointing=True), reference, tokens)["learning"]
        lines.append(f"--gradient_checkpointing (learning: {less:.1f} GB),")
    lines.append(f"lower --max_pixels (an image has up to {image:,} tokens), train adapters with --lora_rank, or take")
    return " ".join([*lines, "more GPUs"])
