"""What a step asks of a GPU: kernels, floating-point operations, bytes, and the memory that is alive.

The classes watch tools/fakecuda.py. Kernels are an estimate: most operators launch one, the others are in KERNELS.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch
from weakref import finalize

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tools.fakecuda import FakeCuda, known_values

# Kernels that one operator launches where it is not one, as ATen's sources have them.
KERNELS = {
    "logsumexp": 9, "isin": 3, "cumsum": 2, "masked_scatter": 3, "nonzero": 4, "slice_backward": 2,
    "select_backward": 2, "_scaled_dot_product_flash_attention_backward": 3, "sort": 4, "topk": 3,
    "embedding_dense_backward": 6, "_scaled_dot_product_efficient_attention_backward": 3, "convolution_backward": 3,
    "unique_consecutive": 4, "masked_scatter_backward": 4, "_flash_attention_backward": 3,
    "_fused_rms_norm_backward": 3,
}  # fmt: skip
WITHOUT = ("empty", "new_empty", "_unsafe_view", "lift_fresh", "record_stream", "_reshape_alias", "resize_", "set_")
FUSED = 65_536 * 320  # elements that one launch of a fused optimizer takes


def kernels_of(function: Callable, args: tuple, result: Any) -> int:
    """How many kernels an operator launches."""
    name = function.__name__.split(".")[0]
    if function.is_view or name.startswith(WITHOUT):
        return 0
    if name.startswith(("_foreach", "_fused")):
        return max(1, sum(tensor.numel() for tensor in args[0]) // FUSED)
    if name in ("index_put", "index_put_", "_index_put_impl_"):
        return 8 if len(args) > 3 and args[3] else 1  # accumulating sorts the indices
    if not any(isinstance(tensor, Tensor) and tensor.numel() for tensor in tree_leaves(result)):
        return 0
    return KERNELS.get(name, 1)


# Attention in segments: the places of the queries and of the two bounds among the arguments, and its matrix products.
SEGMENTED = {
    torch.ops.aten._flash_attention_forward: (0, 3, 4, 2),
    torch.ops.aten._flash_attention_backward: (1, 6, 7, 5),
}


def segment_flops(packet: Callable, args: tuple, bounds_of: Callable = Tensor.cpu) -> int:
    """Floating-point operations of attention in segments; torch's own formula refuses grouped heads before 2.13."""
    query_at, *bounds_at, products = SEGMENTED[packet]
    queries, keys = (bounds_of(args[place]).diff().long() for place in bounds_at)
    heads, size = args[query_at].shape[-2:]
    return 2 * products * heads * size * int((queries * keys).sum())


def flops_of(function: Callable, args: tuple, kwargs: dict, result: Any) -> int:
    """Floating-point operations by torch's own formulas, which count the masked half of causal attention too."""
    packet = function._overloadpacket
    if packet in SEGMENTED:
        return segment_flops(packet, args, known_values)
    if packet not in flop_registry:
        return 0
    given = args[:2] if function in (torch.ops.aten.mm.dtype, torch.ops.aten.bmm.dtype) else args
    return flop_registry[packet](*given, **kwargs, out_val=result)


def bytes_of(function: Callable, args: tuple, kwargs: dict, result: Any) -> int:
    """Bytes read and written: each tensor once, what is expanded as it lies in memory."""
    if function._overloadpacket.__name__ in ("embedding", "index", "gather", "index_select"):  # reads what it takes
        return 2 * sum(tensor.nbytes for tensor in tree_leaves(result))
    tensors = {id(tensor): tensor for tensor in tree_leaves((args, kwargs, result)) if isinstance(tensor, Tensor)}
    total = 0
    for tensor in tensors.values():
        elements = [length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        total += torch.Size(elements).numel() * tensor.element_size()
    return total


class Memory:
    """Bytes of the storages alive on cuda, in blocks of 512 as the allocator counts them, and their peak."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}  # of each storage
        self.total = self.peak = 0

    def __call__(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        self.add(tree_leaves((args, kwargs, result)))

    def add(self, leaves: Sequence) -> None:
        """Counts the storages of these tensors from now on."""
        for tensor in leaves:
            if isinstance(tensor, DTensor):
                tensor = tensor._local_tensor
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    finalize(storage, self._change, storage._cdata, None)
                self._change(storage._cdata, storage.nbytes())

    def _change(self, key: int, size: int | None) -> None:
        """Sets the size of a storage; None if it is freed."""
        before, after = self.sizes.pop(key, 0), -(-(size or 0) // 512) * 512
        if size is not None:
            self.sizes[key] = after
        self.total += after - before
        self.peak = max(self.peak, self.total)

    @contextmanager
    def resized(self) -> Iterator[None]:
        """Sees FSDP empty and refill what it gathers, which calls no operator."""
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            if storage._cdata in self.sizes:
                self._change(storage._cdata, storage.nbytes())
            return storage

        with patch.object(torch.UntypedStorage, "resize_", counted):
            yield


@dataclass
class Cost:
    """What one part of a step asks of the GPU."""

    kernels: int = 0
    flops: int = 0
    bytes: int = 0
    peak: int = 0
    syncs: Counter = field(default_factory=Counter)  # by place
    copies: Counter = field(default_factory=Counter)  # from memory that is not pinned, by place

    def minus(self, less: "Cost") -> "Cost":
        """What this costs more than another."""
        return Cost(
            kernels=self.kernels - less.kernels,
            flops=self.flops - less.flops,
            bytes=self.bytes - less.bytes,
            syncs=self.syncs - less.syncs,
            copies=self.copies - less.copies,
        )


class Meter:
    """Costs by part of the step; an observer of the pretended device."""

    def __init__(self, mode: FakeCuda):
        self.mode, self.memory, self.parts = mode, Memory(), {}
        self.current: Cost | None = None
        mode.observers += [self, self.memory]

    def __call__(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        cost = self.current
        if cost is None:
            return
        kernels = kernels_of(function, args, result)
        cost.kernels += kernels
        cost.flops += flops_of(function, args, kwargs, result)
        cost.bytes += bytes_of(function, args, kwargs, result) if kernels else 0

    @contextmanager
    def part(self, name: str) -> Iterator[Cost]:
        """Adds what the block costs to this part."""
        mode, cost = self.mode, self.parts.setdefault(name, Cost())
        outer = self.current, mode.syncs, mode.copies
        self.current, mode.syncs, mode.copies = cost, cost.syncs, cost.copies
        self.memory.peak = self.memory.total
        yield cost
        cost.peak = max(cost.peak, self.memory.peak)
        self.current, mode.syncs, mode.copies = outer
