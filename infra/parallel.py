"""Processes and sharding: everything that knows how many ranks there are.

One process runs per GPU, started here or by torchrun. FSDP2 shards each decoder layer, each vision block and the root.
Masters stay fp32 while bf16 computes, since at a learning rate of 1e-6 bf16 weights lose their updates. On a CPU in
fp32 the same code runs without sharding. Left out: tensor, context and pipeline parallelism, CPU offload.
"""

import atexit
import logging
import os
import signal
import socket
import sys
from collections import OrderedDict
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

from infra.options import USER_ERROR
from model.packing import pack_row, row_attention
from model.vlm import DECODER_LAYERS, family_of
from rollout import next_logits, root_forward, run_as_forward

STOPPED = 3  # exit code of a run that was told to stop and has saved


@dataclass(frozen=True)
class World:
    """This process's place among all processes."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None  # None where nothing is sharded
    draw_sharded: bool = False  # layers stay sharded while drawing, for want of memory

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def num_shards(self) -> int:
        """How many ranks share one copy of the weights."""
        return 1 if self.mesh is None else self.mesh["shard"].size()


# ---- processes -----------------------------------------------------------------------------------------------------


def launch(main: Callable, config: object) -> None:
    """Runs main(config) in one process per visible GPU; under torchrun, or with at most one GPU, in this process."""
    # Rows and batches change their sizes from step to step: without it the memory fragments. Read when CUDA starts.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    count = torch.cuda.device_count()
    if "RANK" in os.environ or count < 2:
        _run_and_report(main, config)
    else:
        spawn(count, _run_and_report, main, config)


def _run_and_report(main: Callable, config: object) -> None:
    """Runs main(config); an error that the user can mend ends the process with one line instead of a traceback."""
    try:
        code = main(config)
    except ValueError as error:
        if getattr(config, "traceback", False):
            raise
        several = dist.is_initialized() and dist.get_world_size() > 1
        if not several or _first_to_report():
            print(f"error: {error}", file=sys.stderr, flush=True)
        if several:  # a clean exit would leave the process group, and wait for ranks that wait for this one
            os._exit(USER_ERROR)
        sys.exit(USER_ERROR)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        code = 0  # torchrun would show a failure and its traceback
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        end_process(code or 0)
    if code:
        sys.exit(code)


def end_process(code: int = 0) -> None:
    """Ends this process without taking the interpreter apart, for processes that used FSDP over gloo.

    Gloo's threads outlive destroy_process_group, since torch's caches hold the mesh. One that lets go of a Python
    object while the interpreter shuts down aborts the process (measured: 1 exit in 200).
    """
    atexit._run_exitfuncs()  # wandb and tensorboard write what they still hold
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_to_report() -> bool:
    """Whether no other rank has reported an error yet: most errors are raised by all ranks at once."""
    try:
        return dist.distributed_c10d._get_default_store().add("reported errors", 1) == 1
    except RuntimeError:  # rank 0, which keeps the store, has gone: it has told the error that all ranks raise
        return False


def spawn(count: int, main: Callable, *arguments: object) -> None:
    """Runs main(*arguments) in `count` processes of this machine; an error in one ends all of them."""
    # An error is told in one line: torch's and Python's words about processes that end early would surround it.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    workers = mp.spawn(_worker, (count, free_port(), main, arguments), nprocs=count, join=False)
    # Ctrl-C reaches every process of the terminal by itself, but a scheduler's SIGTERM reaches only this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in workers.processes])
    try:
        while not workers.join():  # a process that fails ends the others: SIGTERM, then SIGKILL 30 s later
            pass
    except mp.ProcessExitedException as error:
        if error.exit_code not in (USER_ERROR, STOPPED):
            raise
        sys.exit(error.exit_code)  # the process has said why


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
    end_process()


@contextmanager
def process_group(*, bf16: bool, shard_within_node: bool = False) -> Iterator[World]:
    """Joins the process group that torchrun or `launch` describes, yields this process's place, and leaves at the end.

    `shard_within_node` shards among the GPUs of a node and replicates across nodes (HSDP): less traffic between nodes
    for more memory. A single process gets a group of its own where bf16 computes, since FSDP2 does the casting.
    """
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    device_id = device if cuda else None
    if "RANK" in os.environ:
        # The longest wait is for one rank that writes its part of a checkpoint to a slow disk.
        dist.init_process_group(backend, timeout=timedelta(hours=1), device_id=device_id)
    elif bf16:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id)
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


def compute_dtype(name: str) -> torch.dtype:
    """bf16 or fp32 for "auto", "bf16" or "fp32"."""
    bf16 = torch.cuda.is_available() if name == "auto" else name == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


def all_sum(values: dict[str, float], world: World) -> dict[str, float]:
    """Each value added over the ranks."""
    return _reduce(values, world, dist.ReduceOp.SUM)


def all_max(values: dict[str, float], world: World) -> dict[str, float]:
    """The largest of each value over the ranks."""
    return _reduce(values, world, dist.ReduceOp.MAX)


def _reduce(values: dict[str, float], world: World, operation: dist.ReduceOp) -> dict[str, float]:
    if world.size == 1:
        return values
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor, operation)
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
    """The model on its device, sharded over the mesh and computing in compute_dtype; `trained=False` for a reference.

    Only rank 0 needs to load the weights. The others may start empty (meta tensors); they receive their shards from
    rank 0 a tensor at a time, so one process alone reads the checkpoint and holds it whole.
    """
    if world.mesh is None:
        return model.to(world.device)
    empty = any(parameter.is_meta for parameter in model.parameters())
    received = all_sum({"empty": float(empty)}, world)["empty"] > 0
    whole = dict(model.state_dict()) if received and not empty else {}
    dtypes = {"param_dtype": compute_dtype, "reduce_dtype": torch.float32}
    # The root casts the pixels. A block's inputs are already cast, except the vision tower's fp32 rotary angles.
    block_policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    blocks = model.get_submodule(family_of(model.config.model_type).vision_blocks)
    layers, alone = model.get_submodule(DECODER_LAYERS), world.num_shards == 1
    # A process that holds the whole model needs FSDP only to cast; frozen weights in the right dtype would be copied.
    still = {p for p in model.parameters() if alone and p.dtype == compute_dtype and not p.requires_grad}
    for block in [*layers, *blocks]:
        fully_shard(block, mesh=world.mesh, mp_policy=block_policy, ignored_params=still)
    # The root holds the embeddings, the head and everything between the blocks. It stays gathered from its forward to
    # its backward; a reference has no backward that would free it again.
    root_policy = MixedPrecisionPolicy(**dtypes)
    fully_shard(model, mesh=world.mesh, mp_policy=root_policy, reshard_after_forward=not trained, ignored_params=still)
    if not any(parameter.requires_grad for parameter in blocks.parameters()):
        # The backward of a layer prefetches the block that ran before it; a frozen block has no backward to free it.
        layers[0].set_modules_to_backward_prefetch([model])
    model.run_as_forward = MethodType(run_as_forward, model)
    register_fsdp_forward_method(model, "run_as_forward")
    model = model.to_empty(device=world.device) if empty else model.to(world.device)  # buffers, which FSDP leaves alone
    if received:
        _receive(model, whole, world)
    return model


def _receive(model: nn.Module, whole: dict[str, Tensor], world: World) -> None:
    """Fills the shards of all ranks from rank 0's `whole`, and what a model built from a config lacks."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)  # a tied head is absent
    set_model_state_dict(model, whole, options=options)
    for buffer in model.buffers():  # rotary frequencies are in no state dict
        dist.broadcast(buffer, 0)
    model.generation_config = all_gather([model.generation_config], world)[0]


def gradient_scale(world: World) -> float:
    """The factor of a rank's part of the loss: FSDP averages gradients over ranks, but our losses add up."""
    return float(world.size)


# ---- drawing from a sharded model ----------------------------------------------------------------------------------


@contextmanager
def drawing(model: nn.Module, world: World) -> Iterator[Callable | None]:
    """Lets ranks draw different numbers of tokens; yields the `forward` that sample_completions is to use.

    Every rank holds a full copy while it draws, so the forward is the model's own (None). If a full copy does not fit,
    the layers stay sharded and the ranks run their forwards together.
    """
    if not world.draw_sharded:
        with gathered(model):
            yield None
        return
    with gathered(model, without=set(model.get_submodule(DECODER_LAYERS))):
        forward = LockstepForward(model, world)
        yield forward
        forward.finish()


class LockstepForward:
    """Logits of the next tokens from sharded layers, each gathered as it runs; a rank runs whenever another does.

    It is slow: every token gathers all layers. The tower, the embeddings and the head stay whole, so every forward
    gathers the same, whatever its inputs; a rank that has finished runs on a token of no use.
    """

    def __init__(self, model: nn.Module, world: World):
        self.model, self.world = model, world
        row = pack_row(model, [{"input_ids": torch.zeros(1, 1, dtype=torch.long)}], [[]])
        self.useless = {**row.inputs, **row_attention(model, row.layout)}

    def __call__(self, inputs: dict, last: Tensor) -> Tensor:
        all_sum({"drawing": 1.0}, self.world)
        return root_forward(self.model, next_logits, inputs, last)

    @torch.no_grad()
    def finish(self) -> None:
        """Runs along until every rank has finished."""
        first = torch.zeros(1, dtype=torch.long, device=self.world.device)
        while all_sum({"drawing": 0.0}, self.world)["drawing"]:
            root_forward(self.model, next_logits, self.useless, first)


@contextmanager
def gathered(model: nn.Module, without: Container[nn.Module] = ()) -> Iterator[None]:
    """Holds the whole model on every rank in its compute dtype: no collectives, so ranks may differ in length.

    The blocks run without FSDP's hooks meanwhile. There is nothing to gather, and what hooks do to streams would keep a
    CUDA graph from being recorded. The root keeps its own, which cast the pixels.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule) and module not in without]
    hooks = {module: (module._forward_pre_hooks, module._forward_hooks) for module in modules if module is not model}
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    for module in hooks:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, (before, after) in hooks.items():
            module._forward_pre_hooks, module._forward_hooks = before, after
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()
