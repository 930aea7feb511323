"""The algorithm as functions of tensors: advantages and the clipped, KL-penalised loss.

Nothing here knows models, text, files or processes: each function lifts out with `import torch` alone.
The loss takes its denominators as arguments, so the losses of micro-batches and ranks add up to the loss of the whole
optimizer step, however the step is cut.

Shapes: N completions in the batch given, C tokens of the longest completion.
"""

import torch
from torch import Tensor

# A log-ratio beyond this is clamped and gets no gradient: exp(20) is 5e8, no longer a policy update, and fp32 overflows
# at 88.
MAX_LOG_RATIO = 20.0
VARIANTS = ("grpo", "dapo", "dr_grpo", "gspo")


def group_advantages(
    rewards: Tensor,  # [N] total reward of each completion, the group_size completions of a prompt side by side
    group_size: int,
    *,
    scale: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    """Advantage of each completion within its group, [N]: (reward - mean) / (standard deviation + eps).

    The standard deviation is unbiased and eps is 1e-4, as in VLM-R1. `scale=False` skips the division (Dr. GRPO).
    """
    if group_size < 2:
        raise ValueError(f"group_size {group_size}: an advantage compares completions, so a group needs at least 2")
    if rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(f"rewards of shape {list(rewards.shape)} do not divide into groups of {group_size}")
    groups = rewards.view(-1, group_size).to(torch.promote_types(rewards.dtype, torch.float32))
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    # Rounding leaves 1e-8 in the mean of equal rewards. That is noise, not preference, so it becomes exactly zero.
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return torch.where(equal, torch.zeros_like(advantages), advantages).view(-1)


def k3_divergence(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) per token (http://joschu.net/blog/kl-approx.html)."""
    difference = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.exp() - difference - 1


def token_weights(
    mask: Tensor,  # [N, C] bool
    variant: str,
    num_completions: int | Tensor,
    num_tokens: int | Tensor,
    max_completion_tokens: int | None = None,
) -> Tensor:
    """The weight of each token in the sum that is the loss, [N, C] in float64."""
    ones = mask.double()
    if variant == "dapo":  # arXiv 2503.14476: a token weighs the same in a long completion as in a short one
        return ones / num_tokens
    if variant == "dr_grpo":  # arXiv 2503.20783: a constant, so no length is favoured
        if max_completion_tokens is None:
            raise ValueError(
                'variant "dr_grpo" divides by max_completion_tokens, which is None: pass the limit drawn to'
            )
        return ones / (num_completions * max_completion_tokens)
    # clamp: an empty completion must add nothing instead of 0 / 0.
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
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # [N, 1]
    num_completions = len(mask) if num_completions is None else num_completions
    num_tokens = mask.sum().clamp(min=1) if num_tokens is None else num_tokens

    # The padding must not matter, even if it holds NaN: zero the difference there before anything else.
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

    clamped = torch.where(mask, logprobs - old_logprobs, 0.0).abs() > MAX_LOG_RATIO
    if ref_logprobs is not None:
        clamped = clamped | (torch.where(mask, ref_logprobs - logprobs, 0.0).abs() > MAX_LOG_RATIO)
    per_token = {
        "kl": kl,
        "clamped": clamped,
        # VLM-R1 logs the opposite of a clip fraction (tokens whose unclipped term counts); these are the clipped ones.
        "clip_low": (ratio < 1 - clip_low) & (advantage < 0),
        "clip_high": (ratio > 1 + clip_high) & (advantage > 0),
    }
    figures = {
        name: (torch.where(mask, values.to(ratio.dtype), 0.0).sum() / num_tokens).detach()
        for name, values in per_token.items()
    }
    return loss, figures
