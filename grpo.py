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
VARIANTS = ("grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo")
SAPO_TEMPERATURES = (1.0, 1.05)  # for advantages above 0 and others, as in the paper: worse tokens fade sooner


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


def gdpo_sums(
    rewards: Tensor,  # [N, K] each reward of each completion by itself
    weights: Tensor,  # [N, K] or [K]
    group_size: int,
    *,
    eps: float = 1e-4,
) -> Tensor:
    """The weighted sum of the advantages that each reward gives by itself, [N]; GDPO's first half (arXiv 2601.05242).

    If the sum is the reward, groups that earn (0, 1) and (0, 2) get the same advantages. Here the group in which two
    rewards agree gets larger ones.
    """
    advantages = [group_advantages(column, group_size, eps=eps) for column in rewards.unbind(1)]
    return (torch.stack(advantages, 1) * weights).sum(1)


def gdpo_advantages(
    sums: Tensor,  # [N] from gdpo_sums
    *,
    sum_of_squares: float | Tensor | None = None,
    num_completions: int | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """GDPO's advantages, [N]: the sums over their standard deviation in the whole optimizer step.

    sum_of_squares and num_completions count the whole step, all ranks; by default they count the batch given. Every
    group of sums has a mean of zero, so the mean of the step need not be subtracted.
    """
    sum_of_squares = sums.square().sum() if sum_of_squares is None else sum_of_squares
    num_completions = len(sums) if num_completions is None else num_completions
    return sums / ((sum_of_squares / (num_completions - 1)) ** 0.5 + eps)


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
    """The weight of each token in the sum that is the loss, [N, C] in float64: rounding it would add up over rows."""
    ones = mask.double()
    if variant in ("dapo", "cispo"):  # arXiv 2503.14476: a token of a long completion weighs as much as any other
        return ones / num_tokens
    if variant == "dr_grpo":  # arXiv 2503.20783: a constant, so no length is favoured
        if max_completion_tokens is None:
            raise ValueError('variant "dr_grpo" divides by max_completion_tokens, which is None: pass it')
        return ones / (num_completions * max_completion_tokens)
    # At least 1: an empty completion adds nothing instead of 0 / 0.
    return ones / (mask.sum(1, keepdim=True).clamp(min=1) * num_completions)


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, variant: str) -> Tensor:
    """How many times as likely each token is as when it was drawn, [N, C]; with "gspo" one number per completion."""
    # The padding must not matter, even if it holds NaN: zero the difference there before anything else.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if variant == "gspo":  # each token gets the mean log-ratio of its completion (arXiv 2507.18071, eq. 7)
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(log_ratio)
    return log_ratio.exp()


def policy_loss(
    ratio: Tensor,  # [N, C]
    logprobs: Tensor,  # [N, C], zeros in the padding
    advantage: Tensor,  # [N, 1]
    variant: str,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token before the KL penalty, and whether it is clipped below and above; all [N, C]."""
    low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    never = torch.zeros_like(high)
    if variant == "cispo":  # arXiv 2506.13585: the weight is clipped, so every token keeps a gradient
        weight = ratio.clamp(max=1 + clip_high).detach()
        return -weight * advantage * logprobs, never, high
    if variant == "sapo":  # arXiv 2511.20347: a sigmoid instead of the clip, of slope 1 at a ratio of 1
        better, worse = SAPO_TEMPERATURES
        temperature = torch.full_like(advantage, worse).masked_fill(advantage > 0, better)
        return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage, never, never
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    return loss, low & (advantage < 0), high & (advantage > 0)


def is_clamped(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None, mask: Tensor) -> Tensor:
    """Whether the log-ratio of each token to the old policy or to the reference is clamped, [N, C] bool."""
    clamped = torch.where(mask, logprobs - old_logprobs, 0.0).abs() > MAX_LOG_RATIO
    if ref_logprobs is not None:
        clamped = clamped | (torch.where(mask, ref_logprobs - logprobs, 0.0).abs() > MAX_LOG_RATIO)
    return clamped


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
    """The clipped, KL-penalised loss of this micro-batch and its figures; both add up over micro-batches and ranks.

    num_completions and num_tokens count the whole optimizer step; by default they count the batch given.
    variant: "grpo" averages over each completion's tokens, then over completions (VLM-R1); "dapo" over all tokens;
    "dr_grpo" divides the sum by num_completions * max_completion_tokens; "gspo" has one ratio per completion; "cispo"
    clips the weight of each token instead of its loss, averaged as in dapo; "sapo" is grpo with a soft clip.
    """
    _check_arguments(variant, beta, ref_logprobs)
    assert logprobs.shape == old_logprobs.shape == mask.shape and advantages.shape == mask.shape[:1]
    num_completions = len(mask) if num_completions is None else num_completions
    num_tokens = mask.sum().clamp(min=1) if num_tokens is None else num_tokens

    ratio, advantage = policy_ratio(logprobs, old_logprobs, mask, variant), advantages[:, None]
    token_loss, low, high = policy_loss(
        ratio, torch.where(mask, logprobs, 0.0), advantage, variant, clip_low, clip_high
    )
    kl = torch.zeros_like(token_loss)
    if ref_logprobs is not None:
        kl = k3_divergence(torch.where(mask, logprobs, 0.0), torch.where(mask, ref_logprobs, 0.0))
        token_loss = token_loss + beta * kl
    weights = token_weights(mask, variant, num_completions, num_tokens, max_completion_tokens).to(token_loss.dtype)
    loss = (token_loss * weights).sum()

    # VLM-R1 logs the opposite of a clip fraction (tokens whose unclipped term counts); these are the clipped ones.
    clamped = is_clamped(logprobs, old_logprobs, ref_logprobs, mask)
    figures = {"kl": kl, "clamped": clamped, "clip_low": low, "clip_high": high}
    return loss, {name: _token_mean(values.to(ratio.dtype), mask, num_tokens) for name, values in figures.items()}


def _check_arguments(variant: str, beta: float, ref_logprobs: Tensor | None) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown: choose one of {', '.join(VARIANTS)}")
    if beta and ref_logprobs is None:
        raise ValueError(f"beta is {beta} and ref_logprobs is None: pass the log-probs under the reference")
    if not beta and ref_logprobs is not None:
        raise ValueError("beta is 0 and ref_logprobs is given: pass None, or a beta above 0 for a penalty")


def _token_mean(values: Tensor, mask: Tensor, num_tokens: int | Tensor) -> Tensor:
    """This batch's part of the mean over num_tokens tokens."""
    return (torch.where(mask, values, 0.0).sum() / num_tokens).detach()
