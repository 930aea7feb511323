"""The algorithm as functions of tensors: advantages, loss, and log-probs without a [tokens, vocabulary] tensor.

Nothing here knows models, text, files or processes: each function lifts out with `import torch` alone.
The loss takes its denominators as arguments, so the losses of micro-batches and ranks add up to the loss of the whole
optimizer step; nobody has to know how the step was cut.

Shapes: N completions in the batch given, C tokens of the longest completion, H hidden size, V vocabulary, T tokens.
"""

import torch
from torch import Tensor

# A log-ratio beyond this is no longer a policy update: exp(20) is 5e8, and fp32 overflows at 88. Clamped, it has no
# gradient.
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
