"""A CUDA device that is not there: shapes, dtypes and devices are checked, host syncs are found, nothing is computed.

Inside `FakeCuda` a tensor on `cuda` is one of torch's fake tensors and a tensor on the CPU is real. Each operator on
cuda runs torch's meta kernel for CUDA, so a wrong shape, a wrong dtype, or a CPU tensor beside a CUDA tensor raises as
it does on a GPU. Small tensors keep their values on the CPU, so that code which reads them back (the grid of an image,
the lengths of completions) takes its true way, and each such read is counted with its place.
Left out: the numerics of kernels, alignment, NCCL, fragmentation, what runs at the same time as what.
"""

import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed._tools.fake_collectives  # noqa: F401  teaches fake tensors the collectives
import torch.nn.functional as F
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten, prim = torch.ops.aten, torch.ops.prim
CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1]
KNOWN = 2**16  # elements of the largest tensor whose values are kept

# A torch without CUDA refuses to differentiate tensors on cuda: autograd asks the device for its guard and its stream.
# torch's own FakeGuardImpl, made for its tests, answers; the hooks that say there is no CUDA are made to say yes.
STUB = r"""
#include <new>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex current_device() const override { return 0; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  at::DeviceIndex deviceCount() const override { return 1; }
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
extern "C" void pretend(bool on) {
  static c10::impl::FakeGuardImpl<c10::DeviceType::CUDA> guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)] = on ? &guard : nullptr;
  auto* hooks = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  on ? static_cast<void>(new (hooks) Hooks) : static_cast<void>(new (hooks) at::CUDAHooksInterface);
}
"""


@cache
def compiled_stub() -> Callable[[bool], None] | None:
    """The function that makes this torch believe in a GPU, or forget it; None if torch was built for CUDA.

    It is compiled once, in about 5 seconds, into the user's cache.
    """
    home = Path(torch.__file__).parent
    if torch.version.cuda:
        return None
    key = hashlib.sha256((STUB + torch.__version__ + str(home)).encode()).hexdigest()[:16]
    built = Path.home() / ".cache" / "nano-vlm-r1" / f"fakecuda-{key}.so"
    if not built.exists():
        if shutil.which("g++") is None:
            raise ValueError("this torch is built without CUDA, and pretending one takes g++: install it")
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder, "stub.cpp"), Path(folder, "stub.so")
            source.write_text(STUB)
            command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", source, "-o", out]
            subprocess.run([*command, f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"], check=True)
            partial = built.with_name(f"{built.name}.{Path(folder).name}")
            partial.write_bytes(out.read_bytes())
            partial.rename(built)  # several processes may build it at once
    function = ctypes.CDLL(str(built)).pretend
    function.argtypes, function.restype = [ctypes.c_bool], None
    return function


class FakeCuda(TorchDispatchMode):
    """The mode under which `cuda` is pretended; `syncs` and `copies` count the waits of the host by their place.

    Autograd counts the devices when a process differentiates for the first time: that must be on the pretended one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.syncs: Counter[str] = Counter()  # reads of a value, and operators whose result's shape is a value
        self.copies: Counter[str] = Counter()  # copies to the device from memory that is not pinned
        self.observers: list[Callable] = []  # called with (function, args, kwargs, result) of each operator on cuda

    def __enter__(self) -> "FakeCuda":
        self._stack = ExitStack()
        pretend = compiled_stub()
        if pretend:
            pretend(True)
            self._stack.callback(pretend, False)
            # Without CUDA's kernels autograd would take these apart, and count their parts.
            library = self._stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
            library.impl("silu_backward", torch.empty_like, "CUDA")
            library.impl("_fused_rms_norm", _rms_norm, "CUDA")
            library.impl("_fused_rms_norm_backward", _rms_norm_backward, "CUDA")
        for owner, replacements in _patches(self).items():
            self._stack.enter_context(patch.multiple(owner, **replacements))
        lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy, as on a GPU
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, lift)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def know(self, tensor: Tensor, value: float) -> None:
        """Says that a tensor holds this value everywhere, where only a computation could tell."""
        tensor.untyped_storage().overwritten = False
        tensor.known = torch.full(tensor.shape, value, dtype=tensor.dtype)

    # ---- an operator ----

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):  # it takes itself apart into its local tensors first
            return NotImplemented
        if active_fake_mode() is not None:  # DTensor propagates shapes under a mode of its own
            return function(*args, **kwargs)
        if function is prim.device.default:
            return args[0].device
        if function is aten._pin_memory.default:
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        if function is aten.is_pinned.default:
            return hasattr(args[0], "pinned")
        leaves = tree_leaves((args, kwargs))
        if not any(_on_cuda(leaf) for leaf in leaves):
            return function(*args, **kwargs)
        if _target(function, args, kwargs) == "cpu":
            return self._to_host(function, args, kwargs)
        self._count(function, args, kwargs, leaves)
        result = self._result(function, args, kwargs)
        for observer in self.observers:
            observer(function, args, kwargs, result)
        return result

    def _result(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """What the operator returns: fake tensors on cuda, or a number that the host asked for."""
        if torch.Tag.data_dependent_output in function.tags:
            return self.read(args[0]).item() if function is aten._local_scalar_dense.default else True
        if not _reads_shape(function, args, kwargs):
            with self.fake:
                result = function(*args, **kwargs)
            _keep_values(function, args, kwargs, result)
            return result
        values = _values(function, args, kwargs)
        if values is None:
            raise RuntimeError(f"{function} at {place()}: the shape of its result depends on values that nobody knows")
        with self.fake:
            result = tree_map(lambda value: torch.empty(value.shape, dtype=value.dtype, device=CUDA), values)
        for fake, value in zip(tree_leaves(result), tree_leaves(values), strict=True):
            fake.known = value
        return result

    # ---- what the host reads ----

    def read(self, tensor: Tensor) -> Tensor:
        """The values of a tensor, as far as they are known: all ones otherwise."""
        known = known_values(tensor)
        return torch.ones(tensor.shape, dtype=tensor.dtype) if known is None else known.clone()

    def _to_host(self, function: Callable, args: tuple, kwargs: dict) -> Tensor:
        """A copy from the device to the host."""
        if not kwargs.get("non_blocking"):
            self.syncs[place()] += 1
        if function is aten._to_copy.default:
            return self.read(args[0]).to(kwargs.get("dtype") or args[0].dtype)
        return args[0].copy_(self.read(args[1]))

    def _count(self, function: Callable, args: tuple, kwargs: dict, leaves: list) -> None:
        """Counts a wait of the host for the device."""
        if torch.Tag.data_dependent_output in function.tags or _reads_shape(function, args, kwargs):
            self.syncs[place()] += 1
        from_host = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not _on_cuda(leaf) and leaf.numel()]
        copied = function is aten._to_copy.default or function is aten.copy_.default
        if copied or "index" in function.__name__:  # an index on the CPU is copied, too
            for leaf in from_host:
                if not hasattr(leaf, "pinned"):
                    self.copies[place()] += 1


def place() -> str:
    """File, line and function of the innermost Python frame outside torch and this file."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if "/torch/" not in code.co_filename and code.co_filename != __file__:
            name = code.co_filename.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
            return f"{name}:{frame.f_lineno} {code.co_qualname.split('.<locals>')[0]}"
        frame = frame.f_back
    return "a backward pass"  # autograd's thread has no Python frame of its own


def _on_cuda(leaf: Any) -> bool:
    return (isinstance(leaf, Tensor) and leaf.device.type == "cuda") or (
        isinstance(leaf, torch.device) and leaf.type == "cuda"
    )


def _target(function: Callable, args: tuple, kwargs: dict) -> str:
    """The type of the device that an operator writes to, if it is a copy."""
    if function is aten._to_copy.default:
        return torch.device(kwargs.get("device") or args[0].device).type
    return args[0].device.type if function is aten.copy_.default else ""


def _reads_shape(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether the shape of the result depends on values, so that the host waits for them."""
    if torch.Tag.dynamic_output_shape not in function.tags:
        return False
    if function is aten.index.Tensor:
        return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
    return kwargs.get("output_size") is None  # of repeat_interleave


# ---- values that are known -----------------------------------------------------------------------------------------


def known_values(tensor: Tensor) -> Tensor | None:
    """The values of a small tensor on cuda, if they follow from what the host sent."""
    if getattr(tensor.untyped_storage(), "overwritten", False):
        return None
    return getattr(tensor, "known", None)


def _values(function: Callable, args: tuple, kwargs: dict) -> Any:
    """What the operator returns on the CPU, or None if something that it reads is not known."""
    if torch.Tag.nondeterministic_seeded in function.tags or "empty" in function.__name__:
        return None
    unknown = False

    def on_cpu(leaf: Any) -> Any:
        nonlocal unknown
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        if not isinstance(leaf, Tensor):
            return leaf
        value = known_values(leaf) if _on_cuda(leaf) else leaf
        unknown = unknown or value is None or value.numel() > KNOWN
        return value

    args, kwargs = tree_map(on_cpu, (args, kwargs))
    if unknown:
        return None
    try:
        result = function(*args, **{**kwargs, "pin_memory": False} if "pin_memory" in kwargs else kwargs)
    except (RuntimeError, NotImplementedError):  # no such kernel on a CPU
        return None
    return tree_map(lambda value: value.clone() if any(value is given for given in args) else value, result)


def _keep_values(function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
    """Gives the result its values, and forgets those that the operator overwrites with something unknown."""
    if "c10d" in function.namespace:  # no other rank is there: a collective leaves what it is given
        return
    fakes = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    small = all(fake.numel() <= KNOWN for fake in fakes)
    values = _values(function, args, kwargs) if small else None
    if function._schema.is_mutable:
        arguments = function._schema.arguments
        given = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
        written = [given.get(argument.name) for argument in arguments if argument.is_write]
        for tensor in tree_leaves(written) if values is None else ():
            tensor.untyped_storage().overwritten = True
    elif values is not None:
        for fake, value in zip(fakes, tree_leaves(values), strict=True):
            fake.known = value


# ---- what torch needs to be told -----------------------------------------------------------------------------------


class _Stream:
    """A stream or an event: here everything happens in order."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def record(self, *args: Any) -> "_Stream":
        return self

    wait = wait_event = wait_stream = synchronize = record_event = record


def _patches(mode: FakeCuda) -> dict[Any, dict[str, Any]]:
    """What stands in for functions of torch that ask a driver, by their owner."""

    def nothing(*args: Any) -> None:
        pass

    def tolist(tensor: Tensor) -> list:  # torch's own reads fake tensors element by element, a GPU copies once
        mode.syncs[place()] += 1
        return mode.read(tensor).tolist()

    streams = {"Stream": _Stream, "Event": _Stream, "stream": _Stream, "current_stream": _Stream}
    driver = {"_lazy_init": nothing, "synchronize": nothing, "set_device": nothing, "current_device": lambda: 0}
    return {
        torch.cuda: streams | driver | {"device_count": lambda: 1, "is_initialized": lambda: True},
        FakeTensor: {"tolist": tolist},
        F: {"scaled_dot_product_attention": _attention},
    }


def _rms_norm(states: Tensor, shape: list[int], weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A norm in one kernel: its output, and the fp32 factor of each row that it keeps."""
    return torch.empty_like(states), states.new_empty((*states.shape[:-1], 1), dtype=torch.float32)


def _rms_norm_backward(
    grad: Tensor, states: Tensor, shape: list[int], factors: Tensor, weight: Tensor, mask: list
) -> Any:
    """The gradients of its input and of its weight."""
    return torch.empty_like(states), torch.empty_like(weight)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The kernel that a GPU takes, flash or with a mask memory-efficient; without one, torch takes plain products."""
    half = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0
    if not _on_cuda(query) or not (half or attn_mask is not None):
        return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    attn_mask = attn_mask.expand(*query.shape[:2], -1, -1)
    keeps = torch.is_grad_enabled() and query.requires_grad
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale)[0]


_plain_attention = F.scaled_dot_product_attention
