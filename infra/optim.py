"""Optimizers, the learning rate of a step, and an update that is skipped if it is not finite."""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from infra.config import RunConfig
from infra.parallel import World
from model.vlm import trainable


def make_optimizers(model: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """AdamW over all that is trained; or Muon over the matrices and AdamW, at a tenth of its rate, over the rest."""
    parameters = [parameter for _, parameter in trainable(model)]
    adamw = {"weight_decay": config.weight_decay, "fused": parameters[0].is_cuda}
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, lr=config.learning_rate, **adamw)]
    embeddings = {id(model.get_output_embeddings().weight), id(model.get_input_embeddings().weight)}
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in embeddings]
    taken = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in taken]
    muon = torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay)
    if not rest:  # LoRA's adapters are all matrices
        return [muon]
    return [muon, torch.optim.AdamW(rest, lr=config.learning_rate * 0.1, **adamw)]


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: str) -> float:
    """The factor of the peak learning rate in a step counted from 0."""
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


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients down to max_norm together; returns the norm before.

    A parameter that no row reached (the vision tower in a step of texts) gets a gradient of zero. Without one AdamW
    would skip it, and what it learns would depend on which prompts share a row or a rank.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    # foreach: torch would take shards one by one, a few kernels each.
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def apply_gradients(optimizers: list[torch.optim.Optimizer], *, finite: bool) -> None:
    """Steps if the gradients are finite, and clears them in any case."""
    for optimizer in optimizers:
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def seed_step(seed: int, step: int, world: World) -> torch.Generator:
    """Seeds everything random in a step; returns the generator that completions are drawn with.

    The seed is a function of run, step and rank: there is no random state to save, and no two ranks draw the same.
    """
    number = ((seed * 1_000_003 + step) * 65_537 + world.rank) % 2**64  # torch takes no larger seed
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
    return torch.Generator(world.device).manual_seed(number)
