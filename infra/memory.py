"""What a step holds: the packed rows of a micro-batch, their budget of tokens, and memory by arithmetic."""

import os
import resource
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from infra.options import RunConfig, compute_dtype
from infra.parallel import World, all_sum
from model.logprobs import CHUNK_LOGITS
from model.vlm import DECODER_LAYERS, Prompt, trainable
from rollout import plan_rows

ACTIVATIONS = "activations of a row"
MIN_ROW_TOKENS, MAX_ROW_TOKENS = 256, 65_536  # between which --row_tokens auto looks
Result = TypeVar("Result")


class RowBudget:
    """Tokens of a packed row: as given, or halved whenever memory runs out."""

    def __init__(self, tokens: int, *, may_shrink: bool):
        self.tokens, self.may_shrink = tokens, may_shrink

    def attempt(self, work: Callable[[int], Result]) -> Result:
        """work(tokens), done anew with half of them as often as it runs out of memory; it must start from nothing."""
        while True:
            try:
                return work(self.tokens)
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
            # Out of the `except`: until here the error holds the frames that hold the memory.
            if not self.may_shrink or self.tokens < 2 * MIN_ROW_TOKENS:
                raise ValueError(
                    f"out of memory in a row of {self.tokens} tokens ({reason}): lower --row_tokens, --max_pixels or "
                    "--max_completion_tokens, or add --gradient_checkpointing"
                )
            self.tokens //= 2
            tqdm.write(f"out of memory: the pass is repeated with --row_tokens {self.tokens}, from here on ({reason})")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def row_budget(config: RunConfig, model: nn.Module, world: World, *, reference: bool, known: int = 0) -> RowBudget:
    """--row_tokens; for auto what the estimate leaves room for, the same on every rank.

    One process then halves it where the estimate was too high. Several cannot: the one that runs out has left the
    others waiting in a collective, so the run ends with the error, and they start at half of the estimate. `known` is
    what a run came to that is resumed.
    """
    if config.row_tokens != "auto":
        return RowBudget(int(config.row_tokens), may_shrink=False)
    memory = memory_estimate(model, world, config, reference=reference, row_tokens=1)
    per_token = memory.pop(ACTIVATIONS)
    room = 0.9 * device_memory_gb(world.device) - sum(memory.values())
    tokens = int(room / per_token / (1 if world.size == 1 else 2))
    tokens = -int(all_sum({"tokens": -float(tokens)}, world, largest=True)["tokens"])  # the least of all ranks
    tokens = min(max(tokens, MIN_ROW_TOKENS), known or MAX_ROW_TOKENS)
    return RowBudget(tokens, may_shrink=world.size == 1)


def micro_batches(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Tensor]],  # of each prompt
    row_tokens: int,
    world: World,
    blank: Prompt,
) -> list[tuple[list[Prompt], list[list[Tensor]], list[tuple[int, int]]]]:
    """Packed rows as (prompts, completions, (prompt, completion) of each), as many on every rank, each with an image.

    Each block of a sharded model is gathered from all ranks when it runs. A rank that ran fewer rows, or left out the
    vision tower for want of an image, would leave the others waiting. A blank prompt, which nothing attends to, mends
    both for some 20 tokens.
    """
    lengths = [[len(ids) for ids in group] for group in completions]
    plan = plan_rows([prompt["input_ids"].shape[1] for prompt in prompts], lengths, row_tokens)
    plan += [[]] * (int(all_sum({"rows": len(plan)}, world, largest=True)["rows"]) - len(plan))
    rows = []
    for pieces in plan:
        chosen_prompts = [prompts[number] for number, _ in pieces]
        chosen = [[completions[number][index] for index in indices] for number, indices in pieces]
        # With a frozen tower images were seen while drawing, and no row runs it.
        needs_image = "pixel_values" in blank and not any("pixel_values" in prompt for prompt in chosen_prompts)
        if world.size > 1 and (needs_image or not pieces):
            chosen_prompts, chosen = [*chosen_prompts, blank], [*chosen, []]
        rows.append((chosen_prompts, chosen, [(number, index) for number, indices in pieces for index in indices]))
    return rows


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far: the GPU's, or this process's where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux


def draws_sharded(config: RunConfig, model: nn.Module, world: World, *, reference: bool) -> bool:
    """Whether layers stay sharded while drawing: because asked for, or because a whole copy would not fit."""
    if world.size == 1:
        return False
    terms = memory_estimate(model, world, config, reference=reference, row_tokens=0)
    return config.draw_sharded or sum(terms.values()) > 0.9 * device_memory_gb(world.device)


def device_memory_gb(device: torch.device) -> float:
    """Memory of the GPU, or of the machine where there is none."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def memory_estimate(
    model: nn.Module, world: World, config: RunConfig, *, reference: bool, row_tokens: int
) -> dict[str, float]:
    """GB per GPU of what a step holds, by arithmetic; activations are the roughest of the terms."""
    text = model.config.get_text_config()
    total, held = sum(p.numel() for p in model.parameters()), sum(p.numel() * p.itemsize for p in model.parameters())
    trained = sum(p.numel() for _, p in trainable(model))
    shards = 1 if world.mesh is None else world.mesh["shard"].size()
    width = compute_dtype(config.dtype).itemsize
    layer_width = (
        2 * text.hidden_size if config.gradient_checkpointing else 14 * text.hidden_size + 4 * text.intermediate_size
    )
    layers = sum(p.numel() for p in model.get_submodule(DECODER_LAYERS).parameters())
    gathered = trained if shards == 1 else total - layers if world.draw_sharded else total
    terms = {
        "weights, gradients, moments": (held + 12 * trained) / shards,
        "gathered while drawing": width * gathered if world.mesh is not None else 0,
        "reference": width * total / shards if reference else 0,
        ACTIVATIONS: row_tokens * text.num_hidden_layers * layer_width * width,
        "logits of a chunk": 3 * 4 * CHUNK_LOGITS[world.device.type],
    }
    return {name: size / 1e9 for name, size in terms.items()}
