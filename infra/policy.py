"""The model that is trained and its reference: loaded, adapted and sharded."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import ProcessorMixin

from infra.checkpoint import local_part
from infra.config import RunConfig
from infra.parallel import World, compute_dtype, shard_model
from infra.terminal import say
from model.lora import add_adapters, choose_layers
from model.vlm import describe_processor, load_model, trainable
from rollout import evaluating


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
        say(describe_processor(processor, config.box_space))
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


class FollowingReference:
    """The reference of --ref_every: the policy as it was, by the values of all that is trained.

    It is no second model. While it scores, the policy holds the old values; afterwards it has its own again, bit for
    bit. The old values have the compute dtype, in which a forward would cast them.
    """

    def __init__(self, policy: nn.Module, every: int, dtype: torch.dtype):
        self.policy, self.every = policy, every
        self.values = {name: part.to(dtype, copy=True) for name, part in self._parts().items()}

    def _parts(self) -> dict[str, Tensor]:
        """This rank's part of all that is trained, by name."""
        if isinstance(self.policy, FSDPModule):  # after a forward its root would stay gathered, with the values it had
            self.policy.reshard()
        return {name: local_part(parameter).detach() for name, parameter in trainable(self.policy)}

    @contextmanager
    def in_place(self, step: int) -> Iterator[None]:
        """Turns the policy into the reference of that step inside the block, dropout off."""
        parts = self._parts()
        if step and step % self.every == 0:
            for name, part in parts.items():
                self.values[name].copy_(part)
        own = {name: part.clone() for name, part in parts.items()}  # there are no gradients yet, so there is room
        self._put(self.values)
        try:
            with evaluating(self.policy):
                yield
        finally:
            self._put(own)

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, part in self._parts().items():
            part.copy_(values[name])
