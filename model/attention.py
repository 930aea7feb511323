"""Attention over a shared prompt: a packed row scored without its masked-out work.

The completions of a group share a prompt. Under a dense mask over the packed row, attention also computes what each
completion would see of all others, and throws it away. Here attention is computed in two parts, over the prompt and
over a completion's own tokens, and their log-sum-exps merge the parts exactly.

Hugging Face's layers find this attention by the name in their config (`use_shared_prefix`). A forward passes the
function that computes it as the argument `attend`; without that argument the attention is plain sdpa. Tests compare it
with the dense mask. Left out: sliding windows, attention sinks, dropout.

Shapes: S tokens of a packed row, T of them in completions; n completions of a batch, c tokens of the longest, t of all;
H query heads, K key heads, D their size.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import NamedTuple

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
    """A mask to pass along with `attend`, which reads none: given a 4-D mask, transformers makes none of its own."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def use_shared_prefix(model: nn.Module) -> None:
    """Registers this attention and gives it to the model's text layers; the vision tower keeps its own."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config.get_text_config()._attn_implementation = NAME


@contextmanager
def shared_prefix(model: nn.Module) -> Iterator[None]:
    """Gives the model's text layers this attention inside the block, and the one that they had afterwards."""
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
    """What a layer of transformers calls: attend(layer, query, key, value, scale), or sdpa if none is given."""
    if unsupported := [name for name in ("softcap", "s_aux", "sliding_window") if options.get(name) is not None]:
        raise ValueError(
            f"attention with {', '.join(unsupported)} is not computed here: load the model with plain sdpa"
        )
    if attend is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    return attend(module.layer_idx, query, key, value, scale).transpose(1, 2), None


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys together, from the output [..., D] and log-sum-exp [...] of each."""
    share = torch.sigmoid(other_lse - lse)[..., None]  # the other set's part of the joint softmax
    return torch.lerp(out.to(share.dtype), other.to(share.dtype), share).to(out.dtype), torch.logaddexp(lse, other_lse)


# ---- a packed row --------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Where a prompt and its completions stand in a row."""

    first: int  # where the prompt starts
    middle: int  # where its completions start
    last: int  # where the next group starts


@dataclass(frozen=True)
class Batch:
    """Completions that one kernel call takes together, padded to the longest, which is less than twice the shortest."""

    own: Tensor  # [n, c] place in the row of each token; 0 in the padding
    padding: Tensor  # [n, c] bool
    places: Tensor  # [t] places in the row of all tokens
    order: Tensor  # [t] where these tokens stand among the n * c


class Segments(NamedTuple):
    """Segments of queries, each of which sees one segment of keys: what one call of a GPU's kernel takes."""

    query_bounds: Tensor  # [n + 1] int32: where they begin, and where the last one ends
    key_bounds: Tensor  # [n + 1] int32
    most_queries: int  # of a segment
    most_keys: int


@dataclass(frozen=True)
class RowLayout:
    """Where everything stands in a packed row [prompt | c1 | ... | cG], one group after the other."""

    groups: list[Group]
    places: Tensor  # [T] place in the row of every completion token, completion by completion
    numbers: Tensor  # [T] the number of the completion that each belongs to
    spans: list[tuple[int, int]]  # (place, length) of each completion

    @cached_property
    def batches(self) -> list[Batch]:
        """The completions, those of similar lengths together."""
        return similar_batches(self.spans, self.places.device)

    @cached_property
    def pieces(self) -> Segments:
        """Each prompt and each completion, to itself."""
        prompts = [(group.first, group.middle - group.first) for group in self.groups]
        lengths = [length for _, length in sorted(prompts + self.spans)]
        return _segments(lengths, lengths, self.places.device)

    @cached_property
    def answers(self) -> Segments:
        """The completion tokens of each group, to its prompt."""
        answers, prompts = zip(*((g.last - g.middle, g.middle - g.first) for g in self._answered), strict=True)
        return _segments(answers, prompts, self.places.device)

    @cached_property
    def prompt_places(self) -> Tensor:
        """Places in the row of the prompts that have completions."""
        return _places([(group.first, group.middle - group.first) for group in self._answered], self.places.device)

    @property
    def _answered(self) -> list[Group]:
        return [group for group in self.groups if group.last > group.middle]

    @cached_property
    def mask(self) -> Tensor:
        """[1, 1, S, S] bool, True where a query (row) sees a key: its own prompt and its own completion, to itself."""
        size = self.groups[-1].last
        group = torch.zeros(size, dtype=torch.long, device=self.places.device)
        for number, (first, _, last) in enumerate(self.groups):
            group[first:last] = number
        part = torch.zeros_like(group)  # 0 in a prompt
        part[self.places] = 1 + self.numbers
        same_group = group[:, None] == group[None, :]
        visible = (part[None, :] == 0) | (part[:, None] == part[None, :])
        return (same_group & visible).tril()[None, None]


def row_layout(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], device: torch.device
) -> RowLayout:
    """The layout of a row, from the lengths of its prompts and of each prompt's completions."""
    groups, spans, place = [], [], 0
    for prompt_length, lengths in zip(prompt_lengths, completion_lengths, strict=True):
        first, middle = place, place + prompt_length
        place = middle
        for length in lengths:
            spans.append((place, length))
            place += length
        groups.append(Group(first, middle, place))
    numbers = torch.repeat_interleave(torch.tensor([length for _, length in spans], dtype=torch.long))
    return RowLayout(groups, _places(spans, device), _to_device(numbers, device), spans)


def _places(spans: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Every place of spans (place, length), one after the other."""
    none = torch.empty(0, dtype=torch.long)  # where there is no span to concatenate
    return _to_device(torch.cat([none, *(torch.arange(start, start + length) for start, length in spans)]), device)


def _segments(queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Segments:
    """Segments of these lengths."""
    bounds = (_to_device(torch.tensor([0, *accumulate(sizes)], dtype=torch.int32), device) for sizes in (queries, keys))
    return Segments(*bounds, max(queries), max(keys))


def similar_batches(spans: Sequence[tuple[int, int]], device: torch.device) -> list[Batch]:
    """Spans (place, length) of a row as batches: one long answer would pad all short ones to its length."""
    similar = defaultdict(list)
    for start, length in spans:
        if length:
            similar[length.bit_length()].append((start, length))  # from a power of 2 to the next
    return [_batch(similar[size], device) for size in sorted(similar)]


def _batch(spans: list[tuple[int, int]], device: torch.device) -> Batch:
    starts, lengths = torch.tensor(spans).T
    steps = torch.arange(int(lengths.max()))
    inside = steps < lengths[:, None]
    own = torch.where(inside, starts[:, None] + steps, 0)
    order = inside.flatten().nonzero()[:, 0]  # here, on the CPU: on a GPU the host would have to wait for the count
    return Batch(*(_to_device(values, device) for values in (own, ~inside, own.flatten()[order], order)))


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device; the host does not wait for the copy."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def attend_row(layout: RowLayout, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention [1, H, S, D] of a packed row: a prompt over itself, a completion over its prompt and itself."""
    heads = key.shape[1]
    if not query.is_cpu and (query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] % 8):
        # A GPU's flash kernels take only half precision and only heads whose size is a multiple of 8. The keys are
        # repeated here because, with a mask, `enable_gqa` would choose the kernel that keeps all scores.
        key, value = (states.repeat_interleave(query.shape[1] // heads, 1) for states in (key, value))
        return F.scaled_dot_product_attention(query, key, value, layout.mask, scale=scale)
    if not query.is_cpu:
        rows = (states[0].transpose(0, 1) for states in (query, key, value))
        return _SharedPrefixOnGpu.apply(*rows, layout, scale).transpose(0, 1)[None]
    query = query[0].unflatten(0, (heads, -1))  # [K, H / K, S, D]: the key heads become the batch
    out = _SharedPrefix.apply(query, key[0][:, None], value[0][:, None], layout, scale)
    return out.flatten(0, 1)[None]


class _SharedPrefix(torch.autograd.Function):
    """On a CPU: one or two calls per group for the prompt, and one per batch for the completions' own tokens.

    A kernel's backward pass recomputes probabilities from the log-sum-exp that it is given. Given the one of the whole
    softmax, it returns that softmax's gradient for its own keys, so the gradients of the parts add up (as in ring
    attention).
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
        grad_query, grad_key, grad_value = (torch.zeros_like(states) for states in (query, key, value))
        for queries, keys, causal in _prompt_parts(ctx.layout):
            of_query, of_key, of_value = _kernel_backward(
                grad[:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys],
                out[:, :, queries], lse[:, :, queries], causal, ctx.scale,
            )  # fmt: skip
            grad_query[:, :, queries] += of_query
            grad_key[:, :, keys] += of_key
            grad_value[:, :, keys] += of_value
        for batch in ctx.layout.batches:
            inputs = [_completions(states, batch) for states in (grad, query, key, value, out)]
            padding = batch.padding.repeat(len(query), 1)[:, None]  # [K * n, 1, c]
            own_lse = _completions(lse, batch).masked_fill(padding, torch.inf)  # so the padding has probability 0
            shares = _kernel_backward(*inputs, own_lse, True, ctx.scale)
            for total, share in zip((grad_query, grad_key, grad_value), shares, strict=True):
                total[:, :, batch.places] += _row_tokens(share, batch)
        return grad_query, grad_key, grad_value, None, None


def _prompt_parts(layout: RowLayout) -> list[tuple[slice, slice, bool]]:
    """(queries, keys, causal) for each prompt over itself, and for its completions over the prompt."""
    parts = []
    for first, middle, last in layout.groups:
        prompt = slice(first, middle)
        parts.append((prompt, prompt, True))
        if last > middle:
            parts.append((slice(middle, last), prompt, False))
    return parts


def _completions(states: Tensor, batch: Batch) -> Tensor:
    """The states [K, heads, S, ...] of a row as a batch of completions [K * n, heads, c, ...]."""
    return states[:, :, batch.own].transpose(1, 2).flatten(0, 1)


def _row_tokens(states: Tensor, batch: Batch) -> Tensor:
    """The inverse, without the padding: [K, heads, t, ...]."""
    return states.unflatten(0, (-1, len(batch.own))).transpose(1, 2).flatten(2, 3)[:, :, batch.order]


def _kernel(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """A CPU's flash attention of queries [b, h, L, D] over keys [b, 1, M, D]: the output, its log-sum-exp [b, h, L]."""
    key, value = (states.expand(-1, query.shape[1], -1, -1) for states in (key, value))  # views: nothing is copied
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def _kernel_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of that kernel's queries, keys and values."""
    key, value = (states.expand(-1, query.shape[1], -1, -1) for states in (key, value))
    of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, causal, scale=scale
    )
    return of_query, of_key.sum(1, keepdim=True), of_value.sum(1, keepdim=True)


class _SharedPrefixOnGpu(torch.autograd.Function):
    """The same in two calls, whatever the row holds: every piece over itself, then all completions over their prompts.

    Queries are [S, H, D], keys [S, K, D]: a kernel of segments takes tokens first.
    """

    @staticmethod
    def forward(ctx, query, key, value, layout, scale):
        out, lse = _segments_kernel(query, key, value, layout.pieces, True, scale)  # [S, H, D], [H, S]
        own = layout.places
        if len(own):
            prompts = layout.prompt_places
            over = _segments_kernel(query[own], key[prompts], value[prompts], layout.answers, False, scale)
            merged, merged_lse = merge(out[own], lse[:, own].t(), over[0], over[1].t())
            out[own], lse[:, own] = merged, merged_lse.t()
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        layout, own = ctx.layout, ctx.layout.places
        grads = _segments_backward(grad, query, key, value, out, lse, layout.pieces, True, ctx.scale)
        if len(own):
            prompts = layout.prompt_places
            inputs = (grad[own], query[own], key[prompts], value[prompts], out[own], lse[:, own])
            shares = _segments_backward(*inputs, layout.answers, False, ctx.scale)
            for total, places, share in zip(grads, (own, prompts, prompts), shares, strict=True):
                total[places] += share
        return *grads, None, None


def _segments_kernel(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """A GPU's flash attention, in segments, of queries [q, H, D] over keys [k, K, D]: output and log-sum-exp [H, q]."""
    options = {"dropout_p": 0.0, "is_causal": causal, "return_debug_mask": False, "scale": scale}
    return torch.ops.aten._flash_attention_forward(query, key, value, *segments, **options)[:2]


def _segments_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of that kernel's queries, keys and values."""
    dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the random state of a dropout of 0
    return torch.ops.aten._flash_attention_backward(
        grad.contiguous(), query, key, value, out, lse.contiguous(), *segments, 0.0, causal, dropout, dropout[:0],
        scale=scale,
    )  # fmt: skip
