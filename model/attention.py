"""Attention over a shared prompt: a packed row scored without its masked-out work, a group decoded from one cache.

The completions of a group share a prompt. Under a dense mask over the packed row, attention also computes what each
completion would see of all others, and throws it away; a usual cache holds the prompt once per completion and reads it
as often. Here attention is computed in two parts, over the prompt and over a completion's own tokens, and their
log-sum-exps merge the parts exactly.

Hugging Face's layers find this attention by the name in their config (`use_shared_prefix`). A forward passes the
function that computes it as the argument `attend`; without that argument the attention is plain sdpa. Tests compare it
with the dense mask. Left out: sliding windows, attention sinks, dropout.

Shapes: S tokens of a packed row, T of them in completions; n completions of a batch, c tokens of the longest, t of all;
H query heads, K key heads, D their size; R sequences decoded, B prompts, P tokens of the longest prompt.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

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


@dataclass(frozen=True)
class RowLayout:
    """Where everything stands in a packed row [prompt | c1 | ... | cG], one group after the other."""

    groups: list[Group]
    places: Tensor  # [T] place in the row of every completion token, completion by completion
    numbers: Tensor  # [T] the number of the completion that each belongs to
    batches: list[Batch]  # the completions, those of similar lengths together

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
    groups, spans, place = [], [], 0  # spans: (place, length) of each completion
    for prompt_length, lengths in zip(prompt_lengths, completion_lengths, strict=True):
        first, middle = place, place + prompt_length
        place = middle
        for length in lengths:
            spans.append((place, length))
            place += length
        groups.append(Group(first, middle, place))
    no_place = torch.empty(0, dtype=torch.long)  # a row of prompts alone has no completion to concatenate
    places = torch.cat([no_place, *(torch.arange(start, start + length) for start, length in spans)])
    numbers = torch.repeat_interleave(torch.tensor([length for _, length in spans], dtype=torch.long))
    return RowLayout(groups, _to_device(places, device), _to_device(numbers, device), similar_batches(spans, device))


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
    query = query[0].unflatten(0, (heads, -1))  # [K, H / K, S, D]: the key heads become the batch
    out = _SharedPrefix.apply(query, key[0][:, None], value[0][:, None], layout, scale)
    return out.flatten(0, 1)[None]


class _SharedPrefix(torch.autograd.Function):
    """One or two kernel calls per group for the prompt, and one per batch for the completions' own tokens.

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
    """Flash attention of queries [b, h, L, D] over keys [b, 1, M, D]: the output and its log-sum-exp [b, h, L]."""
    key, value = (states.expand(-1, query.shape[1], -1, -1) for states in (key, value))  # views: nothing is copied
    if not query.is_cpu:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def _kernel_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of that kernel's queries, keys and values."""
    key, value = (states.expand(-1, query.shape[1], -1, -1) for states in (key, value))
    if query.is_cpu:
        of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal, scale=scale
        )
    else:
        dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)  # the random state of a dropout of 0
        of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, causal,
            dropout, dropout[:0], scale=scale,
        )  # fmt: skip
    return of_query, of_key.sum(1, keepdim=True), of_value.sum(1, keepdim=True)


# ---- decoding ------------------------------------------------------------------------------------------------------


class GroupCache:
    """Keys and values while drawing: each prompt's once, and each sequence's own in buffers with room to spare.

    A token is written at `length`, which is a tensor, and what lies beyond it is masked. So nothing in a step depends
    on a number that the host knows, and a CUDA graph of one token serves all until `keep` or `reserve` is called.
    """

    def __init__(
        self,
        prompts: dict[int, tuple[Tensor, Tensor]],  # keys and values [B, K, P, D] by layer, padded at the end
        sizes: Sequence[int],  # tokens of each prompt
        group_size: int,
        linear: Any = None,  # what layers without keys carry; `keep` is passed on to it
    ):
        self.prompts, self.linear = prompts, linear
        self.any_layer = min(prompts)  # of a hybrid model, the first one may have no keys
        self.sizes = torch.tensor(sizes, device=prompts[self.any_layer][0].device)
        self.length = torch.zeros_like(self.sizes[:1])  # [1] how many tokens of its own every sequence has
        self.own = {
            number: [states.new_empty(len(sizes) * group_size, states.shape[1], 0, states.shape[3]) for states in layer]
            for number, layer in prompts.items()
        }
        self.room = 0  # the tokens of its own that a sequence may come to have
        self._place([number for number in range(len(sizes)) for _ in range(group_size)])

    def _place(self, prompt_of: list[int]) -> None:
        """Gives each sequence a slot: its prompt's number * width + its rank among the sequences of that prompt."""
        ranks, counts = [], Counter()
        for number in prompt_of:
            ranks.append(counts[number])
            counts[number] += 1
        self.prompt_of, self.width, device = prompt_of, max(counts.values()), self.sizes.device
        slots = [number * self.width + rank for number, rank in zip(prompt_of, ranks, strict=True)]
        self.slots = self.row_of_slot = None  # as long as every slot is taken, slots are rows
        if len(slots) < len(self.sizes) * self.width:
            rows = dict(zip(slots, range(len(slots)), strict=True))
            self.slots = torch.tensor(slots, device=device)
            # A slot that nobody has computes the first row's attention once more.
            self.row_of_slot = torch.tensor(
                [rows.get(n, 0) for n in range(len(self.sizes) * self.width)], device=device
            )
        padding = torch.arange(self.prompts[self.any_layer][0].shape[2], device=device) >= self.sizes[prompt_of, None]
        hidden = torch.zeros_like(padding, dtype=torch.float32).masked_fill(padding, -torch.inf)
        self.prompt_mask = hidden[:, None, None]  # [R, 1, 1, P]

    def reserve(self, room: int) -> None:
        """Makes room for this many own tokens of every sequence. The buffers at least double if they grow."""
        self.room = room
        size = self.own[self.any_layer][0].shape[2]
        if room > size:
            for layer in self.own.values():
                layer[:] = (F.pad(states, (0, 0, 0, max(64, size, room - size))) for states in layer)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all sequences but these, and every prompt that no sequence continues."""
        index = torch.tensor(rows, device=self.sizes.device)
        for layer in self.own.values():
            layer[:] = (states[index] for states in layer)
        if self.linear is not None:
            self.linear.keep(index)
        prompt_of = [self.prompt_of[row] for row in rows]
        alive = sorted(set(prompt_of))
        if len(alive) < len(self.sizes):
            self.sizes = self.sizes[alive]
            self.prompts = {number: tuple(part[alive] for part in layer) for number, layer in self.prompts.items()}
        self._place([alive.index(number) for number in prompt_of])

    def begin(self) -> None:
        """Hides, for the token that comes next, the part of the buffers that holds none yet."""
        hidden = torch.arange(self.room, device=self.length.device) > self.length
        self.own_mask = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, -torch.inf)  # [room]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention [R, H, 1, D] of every sequence's newest token over its prompt and its own tokens."""
        for states, new in zip(self.own[layer], (key, value), strict=True):
            states.index_copy_(2, self.length, new)
        own_keys, own_values = (states[:, :, : self.room] for states in self.own[layer])
        keys, values = self.prompts[layer]
        query = query[:, :, 0].unflatten(1, (key.shape[1], -1))  # [R, K, H / K, D]
        # All sequences of a prompt, and all query heads of a key head, are queries to one copy of its keys. The softmax
        # is one over both parts: to merge two takes a dozen small kernels more, and on a GPU each costs a launch.
        shared = self._to_rows(_fp32_bmm(self._to_prompts(query), keys.transpose(2, 3)))
        own = _fp32_bmm(query, own_keys.transpose(2, 3))  # [R, K, H / K, room]
        middle = shared.shape[-1]
        scores = own.new_empty(*own.shape[:3], middle + self.room)
        torch.add(self.prompt_mask, shared, alpha=scale, out=scores[..., :middle])
        torch.add(self.own_mask, own, alpha=scale, out=scores[..., middle:])
        probs = scores.softmax(-1).to(value.dtype)
        out = self._to_rows(self._to_prompts(probs[..., :middle]) @ values) + probs[..., middle:] @ own_values
        return out.flatten(1, 2)[:, :, None]

    def _to_prompts(self, states: Tensor) -> Tensor:
        """[R, K, H / K, ...] by sequence as [B, K, width * H / K, ...] by prompt."""
        states = states if self.row_of_slot is None else states[self.row_of_slot]
        return states.unflatten(0, (-1, self.width)).transpose(1, 2).flatten(2, 3)

    def _to_rows(self, states: Tensor) -> Tensor:
        """The inverse, without the slots that nobody has."""
        states = states.unflatten(2, (self.width, -1)).transpose(1, 2).flatten(0, 1)
        return states if self.slots is None else states[self.slots]


def _fp32_bmm(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.is_cuda and a.dtype != dtype:  # half precision in, fp32 out, in one kernel
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=dtype).unflatten(0, a.shape[:2])
    return a.to(dtype) @ b.to(dtype)
