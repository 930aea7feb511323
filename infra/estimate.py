"""The GPU memory that a run needs, by arithmetic; `python -m tools.rehearse` holds it against the tensors of a step."""

import math
import os
import resource
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from infra.config import RunConfig
from infra.parallel import World, compute_dtype
from model.linear_attention import delta_nets
from model.logprobs import CHUNK_LOGITS
from model.mlp import is_lean
from model.vlm import DECODER_LAYERS, family_of, trainable
from rollout import PREFILL_TOKENS, tower_is_frozen

PATCHES = 4  # of an image token, in every family here
PIXELS = 28 * 28  # of an image token


@dataclass(frozen=True)
class RowSize:
    """What a packed row holds."""

    tokens: int
    prompts: int
    image_tokens: int  # of all its prompts


def memory_estimate(
    model: nn.Module, world: World, config: RunConfig, *, reference: bool, row: RowSize
) -> dict[str, dict[str, float]]:
    """GB per GPU by term, of "drawing" and of "learning": the peak of a step is the larger of the two sums.

    The estimate is for a row that is not the step's first, so that gradients are there, and for completions of
    max_completion_tokens. For Qwen2.5-VL in bf16 it is within 10% of what a step holds.
    """
    total, trained = _numbers(model)
    held = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    width = compute_dtype(config.dtype).itemsize
    steady = {
        "weights and moments": (held + 8 * trained) / world.num_shards,
        "reference": width * total / world.num_shards if reference else 0,
    }
    drawing = {
        "gathered weights": width * _gathered(model, world, trained, total),
        **_drawn(model, world, config, row.image_tokens // row.prompts),
    }
    learning = {"gradients": 4 * trained / world.num_shards, **_learned(model, world, config, row)}
    phases = {"drawing": steady | drawing, "learning": steady | learning}
    return {phase: {name: size / 1e9 for name, size in terms.items()} for phase, terms in phases.items()}


def _numbers(module: nn.Module) -> tuple[int, int]:
    """How many parameters a module has, and how many of them are trained."""
    return sum(p.numel() for p in module.parameters()), sum(p.numel() for _, p in trainable(module))


# ---- drawing -------------------------------------------------------------------------------------------------------


def _gathered(model: nn.Module, world: World, trained: int, total: int) -> int:
    """How many parameters a rank gathers while it draws."""
    if world.mesh is None:
        return 0
    if world.num_shards == 1:  # only what is trained has fp32 masters, and so a copy to compute with
        return trained
    layers = sum(p.numel() for p in model.get_submodule(DECODER_LAYERS).parameters())
    return total - layers if world.draw_sharded else total


def _drawn(model: nn.Module, world: World, config: RunConfig, prompt_tokens: int) -> dict[str, float]:
    """Bytes of the cache, and of the larger of seeing images and choosing tokens; a prompt is mostly its image."""
    text, width = model.config.get_text_config(), compute_dtype(config.dtype).itemsize
    prompts, sequences = _batch(world, config)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    nets = delta_nets(model)  # they have a state of fixed size in place of keys and values
    heads = sum(4 * net.num_v_heads * net.head_k_dim * net.head_v_dim for net in nets)
    state = heads + sum(width * net.conv_dim * (net.conv_kernel_size - 1) for net in nets)
    token = 2 * (text.num_hidden_layers - len(nets)) * text.num_key_value_heads * head_size * width
    buckets = 64 * 2 ** math.ceil(math.log2(max(1, config.max_completion_tokens / 64)))  # its buffers double
    together = 1 if tower_is_frozen(model) else max(1, min(prompts, PREFILL_TOKENS // max(1, prompt_tokens)))
    patches = PATCHES * together * prompt_tokens
    return {
        "cache of prompts": prompts * prompt_tokens * token,
        "cache of completions": sequences * buckets * token,
        "states of linear attention": sequences * state,
        # A block of the tower turns its queries and keys in fp32; the 1,176 numbers of a patch are there in two dtypes.
        # Choosing a token needs the logits five times in fp32 and once in fp64.
        "images or logits": max(
            patches * (17 * _tower_width(model) + 3 * 1176) * width, sequences * text.vocab_size * 28
        ),
    }


def _batch(world: World, config: RunConfig) -> tuple[int, int]:
    """How many prompts and completions a rank has in its cache at a time, in training or in evaluation."""
    prompts = sequences = config.eval_batch_size if config.eval_every else 0
    if hasattr(config, "group_size"):
        mine = math.ceil(config.prompts_per_step / world.size)
        mine = min(mine, max(1, config.draw_batch_size // config.group_size))
        prompts, sequences = max(prompts, mine), max(sequences, mine * config.group_size)
    return prompts, sequences


# ---- learning ------------------------------------------------------------------------------------------------------


def _learned(model: nn.Module, world: World, config: RunConfig, row: RowSize) -> dict[str, float]:
    """Bytes that a row adds: of the larger of the beginning of its backward pass and its end."""
    text, width = model.config.get_text_config(), compute_dtype(config.dtype).itemsize
    layers, blocks = _blocks(model)
    tokens, patches = row.tokens, PATCHES * row.image_tokens
    if not any(parameter.requires_grad for parameter in blocks.parameters()):
        patches = 0  # a frozen tower keeps nothing
    numbers = [_kept(layer, text.hidden_size, config) + _kept_by_experts(text) for layer in layers]  # hybrids differ
    kept = [tokens * width * number for number in numbers]  # of each layer
    kept_of_images = patches * _kept(blocks[0], _tower_width(model), config) * width  # of one block of the tower
    again = 0
    if config.gradient_checkpointing:  # inputs alone are kept, and one layer is computed again, beside its gradients
        again = 1.4 * max(*kept, kept_of_images)
        kept = [tokens * width * text.hidden_size] * len(layers)
        kept_of_images = patches * _tower_width(model) * width
    gathered, root_gradients, flight = _exchanged(model, world, width)
    head = model.get_output_embeddings().weight
    logits = 3 * 4 * min(CHUNK_LOGITS[world.device.type], tokens * len(head))
    begins = {
        "activations of the row": sum(kept),
        "activations of its images": len(blocks) * kept_of_images,
        "embeddings and head": gathered + (width * head.numel() if head.requires_grad else 0),
        "logits, or a layer's gradients": max(logits, flight + again),
    }
    ends = {"gradients of embeddings and head": root_gradients}
    return max(begins, ends, key=lambda terms: sum(terms.values()))


def _exchanged(model: nn.Module, world: World, width: int) -> tuple[float, float, float]:
    """Bytes of the gathered root, of its gradients when they are reduced, and of a layer on its way in and out."""
    if world.mesh is None:
        return 0, 0, 0
    layers, blocks = _blocks(model)
    inside = zip(_numbers(layers), _numbers(blocks), strict=True)
    root, root_trained = (whole - sum(parts) for whole, parts in zip(_numbers(model), inside, strict=True))
    layer, layer_trained = _numbers(layers[0])
    if world.num_shards == 1:  # what is frozen is not copied
        root, layer = root_trained, layer_trained
    gradients = (4 + max(width, 4 / world.num_shards)) * root_trained  # cast to fp32, then the sum over ranks
    return width * root, gradients, 2 * width * layer + (width + 4) * layer_trained


def _kept(block: nn.Module, stream: int, config: RunConfig) -> int:
    """Numbers that the backward pass keeps of a token, or of a patch, in one block; `stream` is the block's width.

    They are what its linear layers return, what attention and MLP make of that (nothing, if model/mlp.py made the MLP
    lean), and the streams into and out of its norms; of a norm that model/norms.py leaves alone also the input in fp32
    and the output before its weight.
    """
    linear = sum(module.out_features for module in block.modules() if isinstance(module, nn.Linear))
    slow = [m for m in block.modules() if type(m).__name__.endswith("RMSNorm") and "forward" not in vars(m)]
    lean = sum(m.gate_proj.out_features + m.up_proj.out_features for m in block.modules() if is_lean(m))
    return 2 * linear - lean + (1 if config.lora_rank else 2) * len(slow) * stream


def _kept_by_experts(text: PreTrainedConfig) -> int:
    """The same for the experts that a token goes to, which are no linear layers; 0 without experts."""
    return 4 * getattr(text, "num_experts_per_tok", 0) * getattr(text, "moe_intermediate_size", 0)


def _blocks(model: nn.Module) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The layers of the decoder, and the blocks of the vision tower."""
    names = DECODER_LAYERS, family_of(model.config.model_type).vision_blocks
    return tuple(model.get_submodule(name) for name in names)


def _tower_width(model: nn.Module) -> int:
    """The width of the vision tower's blocks."""
    _, blocks = _blocks(model)
    return min(module.in_features for module in blocks[0].modules() if isinstance(module, nn.Linear))


# ---- in use --------------------------------------------------------------------------------------------------------


def must_draw_sharded(config: RunConfig, model: nn.Module, world: World, *, reference: bool) -> bool:
    """Whether layers stay sharded while drawing: if asked for, or if a full copy would not fit."""
    if world.size == 1:
        return False
    row = RowSize(tokens=0, prompts=1, image_tokens=config.max_pixels // PIXELS)
    terms = memory_estimate(model, world, config, reference=reference, row=row)
    return config.draw_sharded or sum(terms["drawing"].values()) > 0.9 * device_memory_gb(world.device)


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
