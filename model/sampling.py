"""Which token comes next: temperature, top_k, top_p, banned tokens, and one random number for each token.

Nothing here waits for the device, so a CUDA graph can record it.

Shapes: R sequences, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pick_tokens(
    logits: Tensor,  # [R, V] fp32
    uniform: Tensor,  # [R] float64 numbers in [0, 1)
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    banned_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Next ids [R] and their log-probs [R]; temperature 0 takes the most likely."""
    if banned_ids is not None and len(banned_ids):
        logits = logits.index_fill(1, banned_ids, -1e30)
    logprobs = (logits / (temperature or 1.0)).log_softmax(1)
    if temperature == 0:
        ids = logprobs.argmax(1)
    else:
        ids = look_up(restricted(logprobs, top_k, top_p).exp(), uniform)
    return ids, logprobs.gather(1, ids[:, None])[:, 0]


def look_up(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draws entries [R] in proportion to their weights [R, V] by the numbers uniform [R]; never one of weight 0.

    Unlike multinomial this never waits for the device, and an exponential race would cost a random number per entry.
    The block is found first and then the entry in it, because a running sum over a whole row is slow on a GPU. 150,000
    terms need sums in float64.
    """
    blocks = weights.unflatten(1, (-1, math.gcd(weights.shape[1], 256)))
    sums = blocks.sum(2, dtype=torch.float64).cumsum(1)
    sought = uniform[:, None] * sums[:, -1:]
    # The first whose sum exceeds what is sought: what adds nothing is never the first.
    block = torch.searchsorted(sums, sought, right=True).clamp_(max=sums.shape[1] - 1)
    before = F.pad(sums, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(len(blocks), device=block.device), block[:, 0]].cumsum(1, dtype=torch.float64)
    last = inside[:, -1:]
    rest = torch.minimum(sought - before, torch.nextafter(last, torch.zeros_like(last)))  # sums are rounded
    entry = torch.searchsorted(inside, rest, right=True).clamp_(max=blocks.shape[2] - 1)  # for NaN, which falls nowhere
    return (block * blocks.shape[2] + entry)[:, 0]


def restricted(logprobs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Log-probs [R, V], -inf outside the top_k tokens (0: all) and outside the smallest set that holds top_p."""
    if top_k:
        threshold = logprobs.topk(min(top_k, logprobs.shape[1]), dim=1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=1, descending=True)
        probs = ordered.softmax(1)
        outside = probs.cumsum(1) - probs >= top_p  # the tokens before it already hold top_p
        logprobs = logprobs.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return logprobs
