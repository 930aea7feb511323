"""The GPU memory that a run needs, by arithmetic."""

import os
import resource

import torch
from torch import nn

from infra.config import RunConfig
from infra.parallel import World, compute_dtype
from model.logprobs import CHUNK_LOGITS
from model.vlm import DECODER_LAYERS, trainable


def memory_estimate(
    model: nn.Module, world: World, config: RunConfig, *, reference: bool, row_tokens: int
) -> dict[str, float]:
    """GB per GPU of what a step holds; the activations are the roughest term."""
    text = model.config.get_text_config()
    total, held = sum(p.numel() for p in model.parameters()), sum(p.numel() * p.itemsize for p in model.parameters())
    trained = sum(p.numel() for _, p in trainable(model))
    width = compute_dtype(config.dtype).itemsize
    layer_width = 14 * text.hidden_size + 4 * text.intermediate_size
    if config.gradient_checkpointing:
        layer_width = 2 * text.hidden_size
    terms = {
        "weights, gradients, moments": (held + 12 * trained) / world.num_shards,
        "gathered while drawing": width * _gathered(model, world, trained, total),
        "reference": width * total / world.num_shards if reference else 0,
        "activations of a row": row_tokens * text.num_hidden_layers * layer_width * width,
        "logits of a chunk": 3 * 4 * CHUNK_LOGITS[world.device.type],
    }
    return {name: size / 1e9 for name, size in terms.items()}


def _gathered(model: nn.Module, world: World, trained: int, total: int) -> int:
    """How many parameters a rank gathers while it draws."""
    if world.mesh is None:
        return 0
    if world.num_shards == 1:  # only what is trained has fp32 masters, and so a copy to compute with
        return trained
    layers = sum(p.numel() for p in model.get_submodule(DECODER_LAYERS).parameters())
    return total - layers if world.draw_sharded else total


def must_draw_sharded(config: RunConfig, model: nn.Module, world: World, *, reference: bool) -> bool:
    """Whether layers stay sharded while drawing: if asked for, or if a full copy would not fit."""
    if world.size == 1:
        return False
    terms = memory_estimate(model, world, config, reference=reference, row_tokens=0)
    return config.draw_sharded or sum(terms.values()) > 0.9 * device_memory_gb(world.device)


def device_memory_gb(device: torch.device) -> float:
    """Memory of the GPU, or of the machine if there is none."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far: by the GPU, or by this process if there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
