"""The packed rows of a step: one forward and one backward each, as many on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infra.parallel import World, all_max
from model.packing import plan_rows
from model.vlm import Prompt


@dataclass(frozen=True)
class Row:
    """A micro-batch: groups, whole or in part, that fit one packed row."""

    prompts: list[Prompt]
    completions: list[list[Tensor]]  # of each prompt
    members: Tensor  # [n] which of the step's N completions these are
    mask: Tensor  # [n, C] bool, True on their tokens; C is the longest of this row


def pack_rows(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Tensor]],  # of each prompt, the same number for all
    chosen: Sequence[int],  # the prompts to pack
    row_tokens: int,
    blank: Prompt,
    world: World,
) -> list[Row]:
    """The groups of the chosen prompts in rows of about row_tokens, the same number of rows on every rank.

    Each block of a sharded model is gathered from all ranks when it runs. A rank that ran fewer rows, or skipped the
    vision tower for want of an image, would leave the others waiting. So a blank prompt, which nothing attends to,
    fills in wherever a rank has no row or a row has no image.
    """
    lengths = [[len(ids) for ids in completions[number]] for number in chosen]
    plan = plan_rows([prompts[number]["input_ids"].shape[1] for number in chosen], lengths, row_tokens)
    num_rows = int(all_max({"rows": len(plan)}, world)["rows"])
    plan += [[] for _ in range(num_rows - len(plan))]
    rows = []
    for pieces in plan:
        numbers = [chosen[piece.prompt] for piece in pieces]
        row_prompts = [prompts[number] for number in numbers]
        row_completions = [
            [completions[number][index] for index in piece.completions]
            for number, piece in zip(numbers, pieces, strict=True)
        ]
        members = [
            number * len(completions[number]) + index
            for number, piece in zip(numbers, pieces, strict=True)
            for index in piece.completions
        ]
        # If the tower is frozen, prompts hold image features instead of pixels and no row runs the tower.
        lacks_image = "pixel_values" in blank and not any("pixel_values" in prompt for prompt in row_prompts)
        if world.size > 1 and (lacks_image or not pieces):
            row_prompts, row_completions = [*row_prompts, blank], [*row_completions, []]
        rows.append(_row(row_prompts, row_completions, members, world.device))
    return rows


def _row(prompts: list[Prompt], completions: list[list[Tensor]], members: list[int], device: torch.device) -> Row:
    sizes = torch.tensor([len(ids) for group in completions for ids in group], device=device)
    longest = int(sizes.max()) if len(sizes) else 0
    mask = torch.arange(longest, device=device) < sizes[:, None]
    return Row(prompts, completions, torch.tensor(members, dtype=torch.long, device=device), mask)


def empty_truncated(completions: Sequence[Sequence[Tensor]], eos_ids: Sequence[int]) -> list[list[Tensor]]:
    """The completions, emptied where they lack an end token: the length limit cut them off, and no loss is on them."""
    last = iter(torch.stack([ids[-1] for group in completions for ids in group]).tolist())
    return [[ids if next(last) in eos_ids else ids[:0] for ids in group] for group in completions]


def on_host(completions: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The completions on the CPU, in one copy: a copy of each would wait for the device as many times."""
    flat = [ids for group in completions for ids in group]
    copied = iter(torch.cat(flat).cpu().split([len(ids) for ids in flat]))
    return [[next(copied) for _ in group] for group in completions]
