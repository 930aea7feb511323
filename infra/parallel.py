"""Processes and sharding: everything that knows how many ranks there are.

One process per GPU, started here or by torchrun. FSDP2 shards each decoder layer, each vision block and the root;
masters stay fp32 while bf16 computes, since at a learning rate of 1e-6 bf16 weights lose their updates. The CPU in fp32
runs the same code without sharding. Left out: tensor, context and pipeline parallelism, CPU offload.
"""

import math
import os
import signal
import socket
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from model.vlm import DECODER_LAYERS, family_of
from rollout import image_features, next_logits, pack_row, row_attention, row_logprobs


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None  # None where nothing is sharded
    draw_sharded: bool = False  # layers stay sharded while drawing, for want of memory

    @property
    def first(self) -> bool:
        return self.rank == 0


# ---- processes -----------------------------------------------------------------------------------------------------


def launch(main: Callable, *arguments: object) -> None:
    """Runs main(*arguments) in one process per visible GPU; as it is under torchrun, with one GPU or none."""
    count = torch.cuda.device_count()
    if "RANK" in os.environ or count < 2:
        return main(*arguments)
    spawn(count, main, *arguments)


def spawn(count: int, main: Callable, *arguments: object) -> None:
    """Runs main(*arguments) in that many processes of this machine; an error in one ends them all and is raised."""
    workers = mp.spawn(_worker, (count, free_port(), main, arguments), nprocs=count, join=False)
    # Ctrl-C reaches every process of the terminal by itself, a scheduler's SIGTERM only this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in workers.processes])
    while not workers.join():  # one that ends with an error ends the others: SIGTERM, and SIGKILL 30 s later
        pass


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker(rank: int, count: int, port: int, main: Callable, arguments: tuple) -> None:
    torch.set_num_threads(max(1, os.cpu_count() // count))
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    main(*arguments)


@contextmanager
def process_group(*, bf16: bool, shard_within_node: bool = False) -> Iterator[World]:
    """This process's place among all; joins the group torchrun or `launch` describes and leaves it at the end.

    `shard_within_node` shards among the GPUs of a node and replicates across nodes (HSDP): less traffic between nodes
    for more memory. A single process gets a group of its own where bf16 computes, since FSDP2 does the casting.
    """
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        # The longest wait is for one rank to write its part of a checkpoint to a slow disk.
        dist.init_process_group(backend, timeout=timedelta(hours=1), device_id=device if cuda else None)
    elif bf16:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not dist.is_initialized():
        yield World(0, 1, device, None)
        return
    size = dist.get_world_size()
    if shard_within_node:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        mesh = init_device_mesh(device.type, (size // per_node, per_node), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    yield World(dist.get_rank(), size, device, mesh if size > 1 or bf16 else None)
    # Not in a `finally`: leaving the group would wait for ranks that wait for this one, and hide its error.
    dist.destroy_process_group()


def all_sum(values: dict[str, float], world: World, *, largest: bool = False) -> dict[str, float]:
    """The values added over ranks, or the largest of each."""
    if world.size == 1:
        return values
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return dict(zip(values, tensor.tolist(), strict=True))


def all_gather(rows: list, world: World) -> list:
    """The rows of every rank, in the order of ranks."""
    if world.size == 1:
        return rows
    gathered_rows = [None] * world.size
    dist.all_gather_object(gathered_rows, rows)
    return [row for part in gathered_rows for row in part]


def barrier(world: World) -> None:
    """Waits for every rank."""
    if world.size > 1:
        dist.barrier()


# ---- sharding ------------------------------------------------------------------------------------------------------


def shard_model(model: nn.Module, world: World, *, compute_dtype: torch.dtype, trained: bool = True) -> nn.Module:
    """The model on its device, sharded over the mesh, computing in compute_dtype; `trained=False` for a reference.

    Ranks after the first may bring a model without weights (meta tensors); they receive their shards from the first,
    a tensor at a time, so that one rank alone reads the checkpoint and holds it whole.
    """
    if world.mesh is None:
        return model.to(world.device)
    empty = any(parameter.is_meta for parameter in model.parameters())
    received = all_sum({"empty": float(empty)}, world)["empty"] > 0
    whole = dict(model.state_dict()) if received and not empty else {}
    dtypes = {"param_dtype": compute_dtype, "reduce_dtype": torch.float32}
    # The root casts the pixels. A block's inputs are cast already, but for the vision tower's fp32 rotary angles.
    block_policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    blocks = model.get_submodule(family_of(model.config.model_type).vision_blocks)
    layers, alone = model.get_submodule(DECODER_LAYERS), world.mesh["shard"].size() == 1
    # A process that holds all of the model needs FSDP only to cast: what is frozen and cast already would be copied.
    still = {p for p in model.parameters() if alone and p.dtype == compute_dtype and not p.requires_grad}
    for block in [*layers, *blocks]:
        fully_shard(block, mesh=world.mesh, mp_policy=block_policy, ignored_params=still)
    # The root holds the embeddings and the head, tied or not, and all between the blocks. It stays gathered from its
    # forward to its backward; a reference has no backward to free it again.
    root_policy = MixedPrecisionPolicy(**dtypes)
    fully_shard(model, mesh=world.mesh, mp_policy=root_policy, reshard_after_forward=not trained, ignored_params=still)
    if not any(parameter.requires_grad for parameter in blocks.parameters()):
        # The backward of a layer gathers the block that ran before it, which here is a frozen one without a backward.
        layers[0].set_modules_to_backward_prefetch([model])
    for function in (row_logprobs, next_logits, image_features):
        setattr(model, function.__name__, MethodType(function, model))
        register_fsdp_forward_method(model, function.__name__)
    model = model.to_empty(device=world.device) if empty else model.to(world.device)  # buffers: FSDP leaves them
    if received:
        _receive(model, whole, world)
    return model


def _receive(model: nn.Module, whole: dict[str, Tensor], world: World) -> None:
    """Fills the shards of all ranks from the first rank's `whole`, and what a model built from a config lacks."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)  # a tied head is absent
    set_model_state_dict(model, whole, options=options)
    for buffer in model.buffers():  # rotary frequencies are in no state dict
        dist.broadcast(buffer, 0)
    model.generation_config = all_gather([model.generation_config], world)[0]


@contextmanager
def drawing(model: nn.Module, world: World) -> Iterator[None]:
    """Within, ranks may draw different numbers of tokens, from a whole copy each or from sharded layers."""
    with in_step(model, world) if world.draw_sharded else gathered(model):
        yield


@contextmanager
def in_step(model: nn.Module, world: World) -> Iterator[None]:
    """Within, decoder layers are gathered as they run, and a rank runs a forward whenever another does.

    For a model whose whole copy does not fit: every token costs gathering all layers. Tower, embeddings and head stay
    whole, so all forwards gather the same, whatever is in them; a rank that is done runs on a token of no use.
    """
    layers, forward = set(model.get_submodule(DECODER_LAYERS)), model.next_logits
    row = pack_row(model, [{"input_ids": torch.zeros(1, 1, dtype=torch.long)}], [[]])
    useless = {**row.inputs, **row_attention(model, row.layout)}

    def forward_with_all(inputs: dict, last: Tensor) -> Tensor:
        all_sum({"drawing": 1.0}, world)
        return forward(inputs, last)

    with gathered(model, without=layers), torch.no_grad():
        model.next_logits = forward_with_all
        try:
            yield
        finally:
            model.next_logits = forward
        while all_sum({"drawing": 0.0}, world)["drawing"]:
            forward(useless, torch.zeros(1, dtype=torch.long, device=world.device))


@contextmanager
def gathered(model: nn.Module, without: Container[nn.Module] = ()) -> Iterator[None]:
    """Within, every rank holds the whole model in its compute dtype: no collectives, so ranks may differ in length."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule) and module not in without]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def gradient_scale(world: World) -> float:
    """What a rank's part of the loss is multiplied by: FSDP averages gradients over ranks, our losses add up."""
    return float(world.size)


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients down to max_norm together; returns the norm before.

    A parameter that no row reached (the vision tower in a step of texts) gets a gradient of zero: with none, AdamW
    would leave it out, and what it learns would depend on which prompts share a row or a rank.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def apply_gradients(optimizers: list[torch.optim.Optimizer], norm: float) -> bool:
    """Steps and clears the gradients; False, and no step, where their norm is not finite (the same on every rank)."""
    finite = math.isfinite(norm)
    for optimizer in optimizers:
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return finite
