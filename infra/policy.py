"""The model that is trained and its reference: loaded, adapted and sharded."""

import torch
from torch import nn
from tqdm import tqdm
from transformers import ProcessorMixin

from infra.config import RunConfig
from infra.parallel import World, compute_dtype, shard_model
from model.lora import add_adapters, choose_layers
from model.vlm import describe_processor, load_model


def load_policy(config: RunConfig, world: World) -> tuple[nn.Module, ProcessorMixin]:
    """The model to train, sharded, and its processor. Trained weights have fp32 masters, the rest the compute dtype."""
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
        empty=config.dry_run or not world.first,
    )
    if world.first:
        tqdm.write(describe_processor(processor, config.box_space))
    if config.lora_rank:
        put_adapters(model, config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    if config.dry_run:  # a dry run tells sizes alone, and the model's config has them: no weights are loaded
        return model, processor
    return shard_model(model, world, compute_dtype=dtype), processor


def put_adapters(model: nn.Module, config: RunConfig) -> None:
    """Puts adapters on the layers that the options name, and freezes everything else."""
    layers = choose_layers(model, config.lora_targets)
    model.requires_grad_(False)
    add_adapters(
        model,
        layers,
        rank=config.lora_rank,
        alpha=config.lora_alpha or 2 * config.lora_rank,
        dropout=config.lora_dropout,
        seed=config.seed,
    )


def load_reference(config: RunConfig, world: World) -> nn.Module:
    """The frozen model that the KL penalty measures from: the one training began with, in the compute dtype."""
    dtype = compute_dtype(config.dtype)
    model, _ = load_model(config.model, dtype=dtype, empty=not world.first)
    return shard_model(model.requires_grad_(False), world, compute_dtype=dtype, trained=False)
