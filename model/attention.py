"""Attention over a shared prompt: a packed row scored without its masked-out work, a group decoded from one cache.

The completions of a group read the same prompt. A dense mask over the packed row computes what each completion would
see of all others and throws it away; a usual cache holds the prompt once per completion and reads it as often. Here
attention is taken in parts, prompt and own tokens, which their log-sum-exps put together exactly.

Hugging Face's layers call it by the name in their config (`use_shared_prefix`); each forward says by the argument
`attend` what it attends over, and one without it is plain sdpa. The dense mask stays the truth that this is tested
against. Left out: sliding windows, attention sinks, dropout.

Shapes: S tokens of a packed row, T of its completions; n completions of a batch, c tokens of the longest, t of all;
H query heads, K key heads, D their size; R sequences decoded, B prompts, P tokens of the longest prompt.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prefix"


@cache
def no_mask(device: torch.device) -> Tensor:
    """Given beside `attend`: a 4-D mask passes through transformers as it is, so none is made, and nothing reads it."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def use_shared_prefix(model: nn.Module) -> None:
    """Registers the attention and makes it that of the model's text layers; the vision tower keeps its own."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config.get_text_config()._attn_implementation = NAME


@contextmanager
def shared_prefix(model: nn.Module) -> Iterator[None]:
    """Within, the model's text layers use this attention; afterwards the one they had."""
    text = model.config.get_text_config()
    before = text._attn_implementation
    use_shared_prefix(model)
    try:
        yield
    finally:
        text._attn_implementation = before


def shared_prefix_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, attend=None, **options
) -> tuple[Tensor, None]:
    """What a layer of transformers calls: attend(layer, query, key, value, scale), or sdpa where none is given."""
    if unknown := {name for name in ("softcap", "s_aux", "sliding_window") if options.get(name) is not None}:
        raise ValueError(f"attention with {', '.join(unknown)} is not computed here: load the model with plain sdpa")
    if attend is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    return attend(module.layer_idx, query, key, value, scale).transpose(1, 2), None


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over both of two disjoint sets of keys, from what [..., D] and log-sum-exp [...] each gave alone."""
    share = torch.sigmoid(other_lse - lse)[..., None]  # of the other set in the joint softmax
    return torch.lerp(out.to(share.dtype), other.to(share.dtype), share).to(out.dtype), torch.logaddexp(lse, other_lse)


# ---- a packed row --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowLayout:
    groups: list[tuple[int, int, int]]  # (first, middle, last): where a prompt starts, its completions, the next group
    places: Tensor  # [T] place in the row of every completion token, completion by completion
    numbers: Tensor  # [T] which completion each belongs to
    batches: list["Batch"]  # the completions, those of like lengths together

    @cached_property
    def mask(self) -> Tensor:
        """[1, 1, S, S] bool, True where a query (row) sees a key: its own prompt and its own completion, to itself."""
        size = self.groups[-1][-1]
        group, part = (torch.zeros(size, dtype=torch.long, device=self.places.device) for _ in range(2))
        for number, (first, _, last) in enumerate(self.groups):
            group[first:last] = number
        part[self.places] = 1 + self.numbers  # 0 in a prompt
        same_group = group[:, None] == group[None, :]
        visible = (part[None, :] == 0) | (part[:, None] == part[None, :])
        return (same_group & visible).tril()[None, None]


@dataclass(frozen=True)
class Batch:
    """Completions that one kernel call takes together, padded to the longest: at most twice the shortest's length."""

    own: Tensor  # [n, c] place in the row of each token; 0 where the completion has ended
    ended: Tensor  # [n, c] bool
    places: Tensor  # [t] the places that are tokens
    order: Tensor  # [t] where they stand among the n * c


def row_layout(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], device: torch.device
) -> RowLayout:
    """The layout of [prompt | c1 | ... | cG], one group after the other."""
    groups, spans, place = [], [], 0  # spans: (place, length) of each completion
    for prompt_length, lengths in zip(prompt_lengths, completion_lengths, strict=True):
        first, place = place, place + prompt_length
        middle = place
        for length in lengths:
            spans.append((place, length))
            place += length
        groups.append((first, middle, place))
    # One long answer among short ones would pad them all to its length, so each power of two is a batch.
    alike = defaultdict(list)
    for start, length in spans:
        if length:
            alike[length.bit_length()].append((start, length))
    places = [torch.arange(start, start + length) for start, length in spans]
    numbers = torch.repeat_interleave(torch.tensor([length for _, length in spans], dtype=torch.long))
    nothing = torch.empty(0, dtype=torch.long)
    batches = [_batch(alike[size], device) for size in sorted(alike)]
    return RowLayout(groups, _sent(torch.cat([nothing, *places]), device), _sent(numbers, device), batches)


def _batch(spans: list[tuple[int, int]], device: torch.device) -> Batch:
    starts, sizes = torch.tensor(spans).T
    steps = torch.arange(int(sizes.max()))
    inside = steps < sizes[:, None]
    own = torch.where(inside, starts[:, None] + steps, 0)
    order = inside.flatten().nonzero()[:, 0]  # here, on the CPU: a mask as an index would wait for the GPU
    return Batch(*(_sent(values, device) for values in (own, ~inside, own.flatten()[order], order)))


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device, without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def attend_row(layout: RowLayout, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention [1, H, S, D] of a packed row: a prompt over itself, a completion over its prompt and itself."""
    heads = key.shape[1]
    if not query.is_cpu and (query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] % 8):
        # Flash kernels of a GPU take half precision and heads of a multiple of 8 alone. Keys are repeated, since with
        # a mask `enable_gqa` falls to the kernel that keeps all scores.
        key, value = (states.repeat_interleave(query.shape[1] // heads, 1) for states in (key, value))
        return F.scaled_dot_product_attention(query, key, value, layout.mask, scale=scale)
    query = query[0].unflatten(0, (heads, -1))  # [K, H / K, S, D]: key heads are the batch, their queries its heads
    out = _SharedPrefix.apply(query, key[0][:, None], value[0][:, None], layout, scale)
    return out.flatten(0, 1)[None]


class _SharedPrefix(torch.autograd.Function):
    """Two kernels per group and one for each batch of completions' own parts.

    A kernel's backward pass recomputes probabilities from the log-sum-exp it is given. Given that of the whole softmax
    it returns the whole softmax's gradient for its keys, so the parts' gradients add up (as in ring attention).
    """

    @staticmethod
    def forward(ctx, query, key, value, layout, scale):
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
        for queries, keys, causal in _prompt_parts(layout):
            out[:, :, queries], lse[:, :, queries] = _kernel(
                query[:, :, queries], key[:, :, keys], value[:, :, keys], causal, scale
            )
        for batch in layout.batches:
            own = (_completions(states, batch) for states in (query, key, value))
            own_out, own_lse = (_row_tokens(states, batch) for states in _kernel(*own, True, scale))
            out[:, :, batch.places], lse[:, :, batch.places] = merge(
                out[:, :, batch.places], lse[:, :, batch.places], own_out, own_lse
            )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        layout = ctx.layout
        grads = [torch.zeros_like(states) for states in (query, key, value)]
        for queries, keys, causal in _prompt_parts(layout):
            part = (states[:, :, queries] for states in (grad, query))
            inputs = (*part, key[:, :, keys], value[:, :, keys], out[:, :, queries], lse[:, :, queries])
            for total, places, share in zip(
                grads, (queries, keys, keys), _kernel_backward(*inputs, causal, ctx.scale), strict=True
            ):
                total[:, :, places] += share
        for batch in layout.batches:
            inputs = [_completions(states, batch) for states in (grad, query, key, value, out, lse)]
            ended = batch.ended.repeat(len(query), 1)[:, None]  # [K * n, 1, c]
            inputs[-1] = inputs[-1].masked_fill(ended, torch.inf)  # probability 0, whatever stands in the padding
            for total, share in zip(grads, _kernel_backward(*inputs, True, ctx.scale), strict=True):
                total[:, :, batch.places] += _row_tokens(share, batch)
        return *grads, None, None


def _prompt_parts(layout: RowLayout) -> list[tuple[slice, slice, bool]]:
    """(queries, keys, causal) of each prompt over itself and of its completions over it."""
    parts = []
    for first, middle, last in layout.groups:
        prompt = slice(first, middle)
        parts.append((prompt, prompt, True))
        if last > middle:
            parts.append((slice(middle, last), prompt, False))
    return parts


def _completions(states: Tensor, batch: Batch) -> Tensor:
    """[K, heads, S, ...] as a batch of completions [K * n, heads, c, ...]."""
    return states[:, :, batch.own].transpose(1, 2).flatten(0, 1)


def _row_tokens(states: Tensor, batch: Batch) -> Tensor:
    """The way back, padding left out: [K, heads, t, ...]."""
    return states.unflatten(0, (-1, len(batch.own))).transpose(1, 2).flatten(2, 3)[:, :, batch.order]


def _kernel(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Flash attention of queries [b, h, L, D] over keys [b, 1, M, D]: (out, log-sum-exp [b, h, L])."""
    key, value = (states.expand(-1, query.shape[1], -1, -1) for states in (key, value))  # a view: nothing is copied
    if not query.is_cpu:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def _kernel_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values of that kernel."""
    key, value = (states.expand(-1, query.shape[1], -1, -1) for states in (key, value))
    if not query.is_cpu:
        nothing = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the state of a dropout that is not there
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, causal,
            nothing, nothing[:0], scale=scale,
        )  # fmt: skip
    else:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal, scale=scale
        )
    return grads[0], *(states.sum(1, keepdim=True) for states in grads[1:])


# ---- decoding ------------------------------------------------------------------------------------------------------


class GroupCache:
    """Keys and values while drawing: those of a prompt once, of each sequence its own, in buffers that double."""

    def __init__(self, prompts: list[tuple[Tensor, Tensor]], sizes: Sequence[int], group_size: int):
        """`prompts`: per layer keys and values [B, K, P, D], padded behind; `sizes`: tokens of each prompt."""
        self.prompts = prompts
        self.sizes = torch.tensor(sizes, device=prompts[0][0].device)
        self.length = 0  # own tokens of every sequence
        self.own = [
            [states.new_empty(len(sizes) * group_size, states.shape[1], 0, states.shape[3]) for states in layer]
            for layer in prompts
        ]
        self._place([number for number in range(len(sizes)) for _ in range(group_size)])

    def _place(self, prompt_of: list[int]) -> None:
        """Gives each sequence a slot: number of its prompt * width + its rank among the prompt's living sequences."""
        counts, slots = Counter(), []
        for number in prompt_of:
            slots.append((number, counts[number]))
            counts[number] += 1
        self.prompt_of, self.width = prompt_of, max(counts.values())
        slots = [number * self.width + place for number, place in slots]
        self.slots = torch.tensor(slots, device=self.sizes.device)
        padding = torch.arange(self.prompts[0][0].shape[2], device=self.sizes.device) >= self.sizes[:, None]
        self.padding = padding[:, None, None]  # [B, 1, 1, P]

    def advance(self) -> None:
        """Makes room for the next token of every sequence."""
        self.length += 1
        for layer in self.own if self.length > self.own[0][0].shape[2] else ():
            layer[:] = (F.pad(states, (0, 0, 0, max(64, states.shape[2]))) for states in layer)

    def keep(self, rows: Tensor) -> None:
        """Forgets all sequences but these, and prompts that no sequence goes on from."""
        for layer in self.own:
            layer[:] = (states[rows] for states in layer)
        prompt_of = [self.prompt_of[row] for row in rows.tolist()]
        alive = sorted(set(prompt_of))
        if len(alive) < len(self.sizes):
            self.sizes = self.sizes[alive]
            self.prompts = [tuple(states[alive] for states in layer) for layer in self.prompts]
        self._place([alive.index(number) for number in prompt_of])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention [R, H, 1, D] of every sequence's newest token over its prompt and its own tokens."""
        query = query[:, :, 0].unflatten(1, (key.shape[1], -1))  # [R, K, H / K, D]
        keys, values = self.own[layer]
        keys[:, :, self.length - 1], values[:, :, self.length - 1] = key[:, :, 0], value[:, :, 0]
        own = _attend(query, keys[:, :, : self.length], values[:, :, : self.length], scale)
        # All sequences of a prompt, and the query heads of a key head, are queries to one copy of its keys.
        together = query.new_zeros(len(self.sizes) * self.width, *query.shape[1:])
        together[self.slots] = query
        together = together.unflatten(0, (-1, self.width)).transpose(1, 2).flatten(2, 3)  # [B, K, width * H / K, D]
        shared = (
            states.unflatten(2, (self.width, -1)).transpose(1, 2).flatten(0, 1)[self.slots]
            for states in _attend(together, *self.prompts[layer], scale, self.padding)
        )
        return merge(*shared, *own)[0].flatten(1, 2)[:, :, None]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) of queries [b, h, L, D] over keys [b, h, M, D]; scores and softmax in fp32."""
    scores = _fp32_bmm(query, key.transpose(2, 3)).mul_(scale)  # not the query: in bf16 that would round it again
    scores = scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    return scores.sub_(lse[..., None]).exp_().to(value.dtype) @ value, lse


def _fp32_bmm(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.is_cuda and a.dtype != dtype:  # half precision in, fp32 out, in one kernel
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=dtype).unflatten(0, a.shape[:2])
    return a.to(dtype) @ b.to(dtype)
