"""The algorithm as functions of tensors: advantages, loss, and log-probs without a [tokens, vocabulary] tensor.

Nothing here knows models, text, files or processes: each function lifts out with `import torch` alone.
The loss takes its denominators as arguments, so the losses of micro-batches and ranks add up to the loss of the whole
optimizer step; nobody has to know how the step was cut.

Shapes: N completions in the batch given, C tokens of the longest completion, H hidden size, V vocabulary, T tokens.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A log-ratio beyond this is no longer a policy update: exp(20) is 5e8, and fp32 overflows at 88. Clamped, it has no
# gradient.
MAX_LOG_RATIO = 20.0
# Logits that `linear_logprobs` holds at once, in elements: what stays in a CPU's cache, what fills a GPU.
CHUNK_LOGITS = {"cpu": 2**21, "cuda": 2**25}
VARIANTS = ("grpo", "dapo", "dr_grpo", "gspo")


def group_advantages(
    rewards: Tensor,  # [N] total reward of each completion, the group_size completions of a prompt side by side
    group_size: int,
    *,
    scale: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    """Advantage of each completion within its group, [N]: (reward - mean) / (standard deviation + eps).

    The deviation is the unbiased one and eps is 1e-4, as in VLM-R1. `scale=False` leaves out the division (Dr. GRPO).
    """
    if group_size < 2:
        raise ValueError(f"group_size {group_size}: an advantage compares completions, so a group needs at least 2")
    if rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(f"rewards of shape {list(rewards.shape)} do not divide into groups of {group_size}")
    groups = rewards.view(-1, group_size).to(torch.promote_types(rewards.dtype, torch.float32))
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    # Rounding leaves 1e-8 in the mean of equal rewards; the difference is noise, not preference, so it is exactly zero.
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return torch.where(equal, torch.zeros_like(advantages), advantages).view(-1)


def k3_divergence(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per token, >= 0 and unbiased (http://joschu.net/blog/kl-approx.html)."""
    difference = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.exp() - difference - 1


def token_weights(
    mask: Tensor,  # [N, C] bool
    variant: str,
    num_completions: int | Tensor,
    num_tokens: int | Tensor,
    max_completion_tokens: int | None = None,
) -> Tensor:
    """What each token's loss is multiplied by before all are added up, [N, C] in float64."""
    ones = mask.double()
    if variant == "dapo":  # arXiv 2503.14476: a token weighs the same in a long completion as in a short one
        return ones / num_tokens
    if variant == "dr_grpo":  # arXiv 2503.20783: a constant, so that no length is favoured
        if max_completion_tokens is None:
            raise ValueError(
                'variant "dr_grpo" divides by max_completion_tokens, which is None: pass the limit drawn to'
            )
        return ones / (num_completions * max_completion_tokens)
    # An empty completion adds nothing, and no 0 / 0.
    return ones / (mask.sum(1, keepdim=True).clamp(min=1) * num_completions)


def grpo_loss(
    logprobs: Tensor,  # [N, C] under the policy being trained
    old_logprobs: Tensor,  # [N, C] under the policy that drew the completions; logprobs.detach() on the first pass
    ref_logprobs: Tensor | None,  # [N, C] under the reference; None when beta is 0
    advantages: Tensor,  # [N]
    mask: Tensor,  # [N, C] bool, True on the completion's tokens, its end token included
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.04,
    variant: str = "grpo",
    num_completions: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    max_completion_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped, KL-penalised loss of this micro-batch, and its figures; both add up over micro-batches and ranks.

    num_completions and num_tokens are those of the whole optimizer step, by default those of the batch given.
    variant: "grpo" averages over each completion's tokens, then over completions (VLM-R1); "dapo" over all tokens;
    "dr_grpo" divides the sum by num_completions * max_completion_tokens; "gspo" has one ratio per completion.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown: choose one of {', '.join(VARIANTS)}")
    if (ref_logprobs is None) != (beta == 0):
        raise ValueError(
            f"beta is {beta} and ref_logprobs is {'None' if ref_logprobs is None else 'given'}: a penalty "
            "needs both, no penalty neither"
        )
    assert logprobs.shape == old_logprobs.shape == mask.shape and advantages.shape == mask.shape[:1]
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1]; an empty completion adds nothing, and no 0 / 0
    num_completions = len(mask) if num_completions is None else num_completions
    num_tokens = mask.sum().clamp(min=1) if num_tokens is None else num_tokens

    # What stands in the padding must not matter, not even NaN: zero the difference there before anything else.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # [N, C]
    if variant == "gspo":  # the mean log-ratio of the completion, on each of its tokens (arXiv 2507.18071, eq. 7)
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(log_ratio)
    ratio = log_ratio.exp()
    advantage = advantages[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    token_loss = -torch.minimum(ratio * advantage, clipped * advantage)
    kl = torch.zeros_like(token_loss)
    if ref_logprobs is not None:
        kl = k3_divergence(torch.where(mask, logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0))
        token_loss = token_loss + beta * kl

    weights = token_weights(mask, variant, num_completions, num_tokens, max_completion_tokens).to(token_loss.dtype)
    loss = (token_loss * weights).sum()

    def token_mean(values: Tensor) -> Tensor:
        return (torch.where(mask, values, 0.0).sum() / num_tokens).detach()

    # VLM-R1 logs the opposite of a clip fraction (tokens whose unclipped term was chosen); these are the clipped ones.
    beyond = (torch.where(mask, logprobs - old_logprobs, 0.0).abs() > MAX_LOG_RATIO) | (
        ref_logprobs is not None and (torch.where(mask, ref_logprobs - logprobs, 0.0).abs() > MAX_LOG_RATIO)
    )
    figures = {
        "kl": token_mean(kl),
        "clamped": token_mean(beyond.to(ratio.dtype)),
        "clip_low": token_mean(((ratio < 1 - clip_low) & (advantage < 0)).to(ratio.dtype)),
        "clip_high": token_mean(((ratio > 1 + clip_high) & (advantage > 0)).to(ratio.dtype)),
    }
    return loss, figures


def linear_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [T, V] of hidden states [T, H] under a head [V, H], in fp32 or better.

    A bf16 logit near 20 is rounded to 0.125, which moves a ratio by several percent: inputs may be bf16, the sum not.
    Without a derivative for bf16 on a GPU; `linear_logprobs` has one.
    """
    return _fp32_mm(hidden, weight.t())


def _fp32_mm(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)  # bf16 in, fp32 out, in one kernel
    return a.to(dtype) @ b.to(dtype)


class _LinearLogprobs(torch.autograd.Function):
    """The vocabulary is cut, not the tokens: the softmax needs two running numbers per token, and backward a block of
    the weight's gradient is one product over all tokens, written once. Blocks of logits are computed twice, never kept.
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
            place = (ids - block.start).clamp(0, logits.shape[1] - 1)
            own = torch.where(place == ids - block.start, logits.gather(1, place[:, None])[:, 0], own)
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
            grad = torch.zeros_like(log_p) if grad_entropies is not None else None
            if grad is not None:  # d entropy / d logit_v = -p_v (log p_v + entropy)
                grad -= log_p.exp() * (log_p + entropies[:, None]) * grad_entropies[:, None]
            if grad_logprobs is not None:  # d logp(id) / d logit_v = [v is id] - p_v
                share = log_p.exp_().mul_(-grad_logprobs[:, None])
                place = (ids - block.start).clamp(0, share.shape[1] - 1)
                share.scatter_add_(1, place[:, None], (grad_logprobs * (place == ids - block.start))[:, None])
                grad = share if grad is None else grad.add_(share)
            grad = grad.div_(ctx.temperature).to(weight.dtype)
            grad_hidden += _fp32_mm(grad, weight[block])
            if grad_weight is not None:
                torch.mm(grad.t(), hidden, out=grad_weight[block])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


def _vocabulary_blocks(size: int, banned_ids: Sequence[int], chunk: int, device: torch.device) -> list:
    """(slice, banned ids counted from its start) of each block, cut on the host: the device is not waited for."""
    banned = sorted(set(banned_ids))
    blocks = [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]
    borders = pairwise([bisect_left(banned, block.start) for block in blocks] + [len(banned)])
    on_device = torch.tensor(banned, dtype=torch.long)
    on_device = on_device.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_device.to(device)
    return [(block, on_device[first:last] - block.start) for block, (first, last) in zip(blocks, borders, strict=True)]


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
    chunk: int | None = None,  # entries of the vocabulary at a time
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the tokens, each [T] in fp32, from `chunk` entries of the vocabulary at a time.

    Both are differentiable, once. `banned_ids` have probability 0, as in sampling; none may be among `ids`. At 2,000
    tokens and 152k entries the usual log_softmax keeps three [T, V] tensors, 3.6 GB; here the peak is the gradient of
    the weight and two blocks.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: log-probs need a distribution, so it must be above 0")
    if len(hidden) != len(ids):
        raise ValueError(f"{len(hidden)} hidden states cannot predict {len(ids)} tokens")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden states of {hidden.dtype} and a head of {weight.dtype}: cast one to the other's")
    chunk = chunk or max(256, CHUNK_LOGITS[hidden.device.type] // max(1, len(ids)))
    return _LinearLogprobs.apply(hidden, weight, ids, tuple(banned_ids), temperature, chunk)
