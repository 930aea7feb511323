"""Log-probs and entropies of tokens without a [tokens, vocabulary] tensor.

The file needs nothing but torch, so it lifts out as it is.

Shapes: T tokens, H hidden size, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# How many logits a block holds: few enough for a CPU's cache, enough to fill a GPU.
CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**25}
ALIGNED = 256  # a block's width is a multiple of it: with odd widths these products took a ninth of a step on an H200


def linear_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [T, V] of hidden states [T, H] under a head [V, H], in fp32 or better.

    A bf16 logit near 20 is rounded to 0.125, which moves a ratio by several percent: inputs may be bf16, sums may not.
    It has no derivative for bf16 on a GPU; `linear_logprobs` has one.
    """
    return _fp32_mm(hidden, weight.t())


def _fp32_mm(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)  # bf16 in, fp32 out, in one kernel
    return a.to(dtype) @ b.to(dtype)


class _LinearLogprobs(torch.autograd.Function):
    """Log-probs and entropies from blocks of the vocabulary.

    Cutting the vocabulary instead of the tokens keeps the backward pass simple: the softmax needs a few running numbers
    per token, and a block of the weight's gradient is one product over all tokens, written once. The logits of a block
    are computed twice and never kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, ids, banned_ids, temperature, chunk):
        ctx.set_materialize_grads(False)
        blocks = _vocabulary_blocks(len(weight), banned_ids, chunk, ids.device)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        # Running, as if the vocabulary ended here: the largest logit, the sum of exp(logit - largest), the same sum
        # with each term times its logit; and the logit of the token itself.
        largest = hidden.new_full((len(ids),), -torch.inf, dtype=dtype)
        total, weighted, own = (torch.zeros_like(largest) for _ in range(3))
        for block, banned in blocks:
            logits = _block_logits(hidden, weight[block], banned, temperature)
            before, largest = largest, torch.maximum(largest, logits.amax(1))
            shrink = (before - largest).exp()
            index = ids - block.start
            place = index.clamp(0, logits.shape[1] - 1)
            own = torch.where(place == index, logits.gather(1, place[:, None])[:, 0], own)
            exps = (logits - largest[:, None]).exp_()
            total = total * shrink + exps.sum(1)
            weighted = weighted * shrink + exps.mul_(logits).sum(1)
        normalizers = largest + total.log()
        entropies = normalizers - weighted / total
        ctx.save_for_backward(hidden, weight, ids, normalizers, entropies)
        ctx.blocks, ctx.temperature = blocks, temperature
        return own - normalizers, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropies):
        hidden, weight, ids, normalizers, entropies = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=normalizers.dtype)  # a sum over blocks
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for block, banned in ctx.blocks:
            log_p = _block_logits(hidden, weight[block], banned, ctx.temperature).sub_(normalizers[:, None])
            grad = None
            if grad_entropies is not None:  # d entropy / d logit_v = -p_v (log p_v + entropy)
                grad = log_p.exp() * (log_p + entropies[:, None]) * -grad_entropies[:, None]
            if grad_logprobs is not None:  # d logp(id) / d logit_v = [v is id] - p_v
                share = log_p.exp_().mul_(-grad_logprobs[:, None])
                index = ids - block.start
                place = index.clamp(0, share.shape[1] - 1)
                share.scatter_add_(1, place[:, None], (grad_logprobs * (place == index))[:, None])
                grad = share if grad is None else grad.add_(share)
            grad = grad.div_(ctx.temperature).to(weight.dtype)
            grad_hidden += _fp32_mm(grad, weight[block])
            if grad_weight is not None:
                torch.mm(grad.t(), hidden, out=grad_weight[block])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def _vocabulary_blocks(
    size: int, banned_ids: Sequence[int], chunk: int, device: torch.device
) -> list[tuple[slice, Tensor]]:
    """Each block as a slice of the vocabulary, with the banned ids in it, counted from its start."""
    banned = sorted(set(banned_ids))
    on_device = torch.tensor(banned, dtype=torch.long)
    on_device = on_device.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_device.to(device)
    blocks = []
    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        # Cut by positions that the host knows: a comparison on the device would make the host wait for it.
        first, last = bisect_left(banned, start), bisect_left(banned, stop)
        blocks.append((slice(start, stop), on_device[first:last] - start))
    return blocks


def _block_logits(hidden: Tensor, weight: Tensor, banned: Tensor, temperature: float) -> Tensor:
    logits = linear_logits(hidden, weight)
    logits = logits if temperature == 1 else logits.div_(temperature)
    return logits.index_fill_(1, banned, -1e30)  # finite: its probability is exactly 0, and 0 * -1e30 is not NaN


def linear_logprobs(
    hidden: Tensor,  # [T, H] the states that predict the tokens
    weight: Tensor,  # [V, H] the output embedding
    ids: Tensor,  # [T] the tokens predicted
    *,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    chunk: int | None = None,  # vocabulary entries per block
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the tokens, each [T] in fp32, from blocks of `chunk` vocabulary entries.

    Both can be differentiated once. `banned_ids` have probability 0, as in sampling; none may be among `ids`. At 2,000
    tokens and 152k entries the usual log_softmax keeps three [T, V] tensors, 3.6 GB; here the peak is the gradient of
    the weight plus two blocks.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: log-probs need a distribution, so it must be above 0")
    if len(hidden) != len(ids):
        raise ValueError(f"{len(hidden)} hidden states cannot predict {len(ids)} tokens")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden states of {hidden.dtype} and a head of {weight.dtype}: cast one to the other's")
    chunk = chunk or max(1, CHUNK_LOGITS[hidden.device.type] // max(1, len(ids)) // ALIGNED) * ALIGNED
    return _LinearLogprobs.apply(hidden, weight, ids, tuple(banned_ids), temperature, chunk)
