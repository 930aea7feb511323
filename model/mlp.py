"""A gated MLP that keeps two of its four hidden tensors for the backward pass, at a width that GPUs like.

The hidden tensors gate, act(gate), up and their product are three quarters of what a decoder layer keeps. The backward
pass recomputes the second and the fourth, which costs two small kernels and no matrix product: checkpointing stops as
soon as it has what it needs. Learning from rows of 2,972 tokens at 3B peaks at 81 GB (`python -m tools.rehearse 3b`).

The MLPs of Qwen2.5-VL's tower have 3,420 hidden units. That is no multiple of 8, so cuBLAS has no fast kernel for them:
on an H200 these products took a third of the time in which prompts are read. Four zero units of padding change nothing.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def use_lean_mlps(model: nn.Module) -> None:
    """Replaces the forward of the gated MLPs; GLM's projector has further parts and keeps its own."""
    for module in model.modules():
        if is_gated(module):
            module.forward = MethodType(lean_mlp, module)


def is_gated(module: nn.Module) -> bool:
    """Whether this is a gated MLP, and nothing more."""
    return {name for name, _ in module.named_children()} == PARTS


def is_lean(module: nn.Module) -> bool:
    """Whether this is a gated MLP that has been given this forward."""
    return "forward" in vars(module) and is_gated(module)


def lean_mlp(mlp: nn.Module, states: Tensor) -> Tensor:
    """The forward of a gated MLP: down(act(gate) * up)."""
    plain = all(type(layer) is nn.Linear for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))  # without adapters
    extra = -mlp.gate_proj.out_features % 8 if plain else 0
    gate, up = (_widened(layer, states, extra) for layer in (mlp.gate_proj, mlp.up_proj))

    def rest(gate: Tensor, up: Tensor) -> Tensor:
        hidden, down = mlp.act_fn(gate) * up, mlp.down_proj
        return F.linear(hidden, F.pad(down.weight, (0, extra)), down.bias) if extra else down(hidden)

    return checkpoint(rest, gate, up, use_reentrant=False) if torch.is_grad_enabled() else rest(gate, up)


def _widened(layer: nn.Linear, states: Tensor, extra: int) -> Tensor:
    """The layer's output, padded with `extra` columns of zeros; the padded weight lives until the backward pass."""
    if not extra:
        return layer(states)
    bias = None if layer.bias is None else F.pad(layer.bias, (0, extra))
    return F.linear(states, F.pad(layer.weight, (0, 0, 0, extra)), bias)
