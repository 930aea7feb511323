"""Keys and values while drawing: each prompt's once, and each sequence's own.

A usual cache holds the prompt once per completion and reads it as often. Here all completions of a prompt, and all
query heads of a key head, are queries to one copy of its keys.

Shapes: R sequences decoded, B prompts, P tokens of the longest prompt; H query heads, K key heads, D their size.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
