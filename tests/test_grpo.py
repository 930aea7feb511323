"""grpo.py against hand arithmetic and a loss written out token by token."""

import math

import pytest
import torch
from torch.testing import assert_close

from grpo import group_advantages, grpo_loss, k3_divergence


def batch(n=4, c=5, dtype=torch.float64):
    """Random log-probs of three policies, advantages and a ragged mask."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    logprobs, old, ref, advantages = draw(n, c) - 2, draw(n, c) - 2, draw(n, c) - 2, draw(n)
    lengths = torch.tensor([5, 1, 3, 2])[:n]
    return logprobs.requires_grad_(), old, ref, advantages, torch.arange(c) < lengths[:, None]


# ---- advantages ----------------------------------------------------------------------------------------------------


def test_advantages_are_the_hand_computed_ones_with_the_unbiased_deviation():
    # rewards 0, 1, 2: mean 1, unbiased deviation 1; the biased one would be 0.816
    assert_close(group_advantages(torch.tensor([0.0, 1.0, 2.0]), 3), torch.tensor([-1.0, 0.0, 1.0]) / 1.0001)


def test_groups_are_compared_within_themselves_only():
    rewards = torch.tensor([0.0, 1.0, 10.0, 11.0])
    both = group_advantages(rewards, 2)
    assert_close(both[:2], both[2:])


def test_equal_rewards_give_exact_zeros_where_the_mean_is_rounded():
    for value in (0.1, 1 / 3, 0.7, 1e-3):
        assert group_advantages(torch.full((56,), value), 7).eq(0).all()


def test_advantages_without_scaling_are_the_distance_from_the_mean():
    assert_close(group_advantages(torch.tensor([0.0, 3.0]), 2, scale=False), torch.tensor([-1.5, 1.5]))


def test_advantages_leave_the_rewards_alone():
    rewards = torch.rand(8)
    before = rewards.clone()
    group_advantages(rewards, 4)
    assert rewards.equal(before)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_group_of_one_or_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match="group"):
        group_advantages(torch.zeros(4), size)


def test_a_wide_spread_of_rewards_and_float64_are_kept():
    rewards = torch.tensor([0.0, 100.0, 1e-9, 2e-9], dtype=torch.float64)
    advantages = group_advantages(rewards, 2)
    assert advantages.dtype == torch.float64
    assert advantages[1] == pytest.approx(50 / (100 / 2**0.5 + 1e-4)) and advantages[3] > advantages[2]


# ---- loss ----------------------------------------------------------------------------------------------------------


def slow_loss(logprobs, old, ref, advantages, mask, *, low, high, beta, variant, limit=None):
    """The same loss one token at a time in Python floats."""
    logprobs, total, tokens = logprobs.detach(), 0.0, int(mask.sum())
    for row in range(len(mask)):
        length = int(mask[row].sum())
        differences = [float(logprobs[row, t] - old[row, t]) for t in range(length)]
        losses = []
        for t in range(length):
            ratio = math.exp(sum(differences) / length if variant == "gspo" else differences[t])
            advantage = float(advantages[row])
            loss = -min(ratio * advantage, max(1 - low, min(1 + high, ratio)) * advantage)
            if ref is not None:
                gap = float(ref[row, t] - logprobs[row, t])
                loss += beta * (math.exp(gap) - gap - 1)
            losses.append(loss)
        weight = {"dapo": 1 / tokens, "dr_grpo": 1 / (len(mask) * (limit or 1))}.get(variant, 1 / (length * len(mask)))
        total += sum(losses) * weight
    return total


@pytest.mark.parametrize("variant", ["grpo", "dapo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_is_the_sum_over_tokens_written_out(variant, beta):
    logprobs, old, ref, advantages, mask = batch()
    ref = ref if beta else None
    loss, _ = grpo_loss(logprobs, old, ref, advantages, mask, clip_low=0.1, clip_high=0.3, beta=beta, variant=variant,
                        max_completion_tokens=7)  # fmt: skip
    expected = slow_loss(logprobs, old, ref, advantages, mask, low=0.1, high=0.3, beta=beta, variant=variant, limit=7)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("variant", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_losses_gradients_and_figures_of_micro_batches_add_up(variant):
    logprobs, old, ref, advantages, mask = batch()
    options = {"variant": variant, "max_completion_tokens": 7}
    whole, figures = grpo_loss(logprobs, old, ref, advantages, mask, **options)
    [gradient] = torch.autograd.grad(whole, logprobs)
    assert not any(value.requires_grad for value in figures.values())
    options |= {"num_completions": 4, "num_tokens": int(mask.sum())}
    parts = [
        grpo_loss(logprobs[i], old[i], ref[i], advantages[i], mask[i], **options) for i in (slice(0, 1), slice(1, 4))
    ]
    assert_close(sum(loss for loss, _ in parts), whole)
    assert_close(torch.autograd.grad(sum(loss for loss, _ in parts), logprobs)[0], gradient)
    for name, value in figures.items():
        assert_close(sum(part[name] for _, part in parts), value)


def test_on_the_first_pass_the_gradient_is_that_of_the_policy_gradient():
    logprobs, _, _, advantages, mask = batch()
    loss, figures = grpo_loss(logprobs, logprobs.detach(), None, advantages, mask, beta=0)
    [gradient] = torch.autograd.grad(loss, logprobs)
    lengths = mask.sum(1, keepdim=True)
    assert_close(gradient, -(advantages[:, None] * mask / lengths / 4))
    assert figures["clip_low"] == 0 and figures["clip_high"] == 0


def test_a_clipped_token_has_no_gradient_and_is_counted_on_its_side():
    logprobs = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)  # ratios e and 1/e
    mask = torch.ones(2, 2, dtype=torch.bool)
    loss, figures = grpo_loss(logprobs, torch.zeros(2, 2), None, torch.tensor([1.0, -1.0]), mask, beta=0)
    [gradient] = torch.autograd.grad(loss, logprobs)
    assert gradient[0, 0] == 0 and gradient[1, 0] == 0 and (gradient[:, 1] != 0).all()
    assert float(figures["clip_high"]) == 0.25 and float(figures["clip_low"]) == 0.25


def test_a_ratio_that_moved_against_its_advantage_is_not_clipped():
    logprobs = torch.tensor([[1.0], [-1.0]], requires_grad=True)  # likelier though worse, and less likely though better
    mask = torch.ones(2, 1, dtype=torch.bool)
    loss, figures = grpo_loss(logprobs, torch.zeros(2, 1), None, torch.tensor([-1.0, 1.0]), mask, beta=0)
    [gradient] = torch.autograd.grad(loss, logprobs)
    assert_close(gradient, torch.tensor([[math.e], [-1 / math.e]]) / 2)
    assert figures["clip_high"] == 0 and figures["clip_low"] == 0


def test_with_one_ratio_per_completion_the_padding_is_not_counted_as_clipped():
    logprobs, mask = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[True, False, False]])  # a ratio of e
    _, figures = grpo_loss(logprobs, torch.zeros(1, 3), None, torch.ones(1), mask, beta=0, variant="gspo")
    assert float(figures["clip_high"]) == 1 and float(figures["clip_low"]) == 0


def test_padding_does_not_matter_even_where_it_is_nan():
    logprobs, old, ref, advantages, mask = batch()
    loss, _ = grpo_loss(logprobs, old, ref, advantages, mask)
    dirty = [torch.where(mask, values.detach(), torch.nan) for values in (logprobs, old, ref)]
    dirty[0].requires_grad_()
    again, _ = grpo_loss(*dirty, advantages, mask)
    [gradient] = torch.autograd.grad(again, dirty[0])
    assert_close(again, loss)
    assert gradient.isfinite().all() and (gradient[~mask] == 0).all()


def test_an_empty_completion_adds_nothing():
    logprobs, old, ref, advantages, mask = batch()
    mask = mask & (torch.arange(4) != 2)[:, None]
    loss, _ = grpo_loss(logprobs, old, ref, advantages, mask)
    keep = torch.tensor([0, 1, 3])
    rest, _ = grpo_loss(logprobs[keep], old[keep], ref[keep], advantages[keep], mask[keep], num_completions=4)
    assert_close(loss, rest)


def test_a_ratio_that_would_overflow_stays_finite():
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = grpo_loss(torch.zeros(1, 1), torch.full((1, 1), -1e4), torch.full((1, 1), 1e4), -torch.ones(1), mask)
    assert loss.isfinite()


def test_ratios_and_divergences_beyond_exp_are_clamped_and_counted():
    old, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    logprobs = torch.tensor([[100.0, 0.0], [0.0, 0.0]], requires_grad=True)
    loss, figures = grpo_loss(logprobs, old, None, torch.tensor([-1.0, 1.0]), mask, beta=0)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all() and float(figures["clamped"]) == 1 / 4
    ref = torch.tensor([[0.0, 0.0], [0.0, 500.0]])
    loss, figures = grpo_loss(torch.zeros(2, 2), old, ref, torch.tensor([-1.0, 1.0]), mask, beta=0.1)
    assert loss.isfinite() and float(figures["clamped"]) == 1 / 4
    _, figures = grpo_loss(old, old, ref, torch.tensor([-1.0, 1.0]), ref == 0, beta=0.1)  # in the padding: not counted
    assert float(figures["clamped"]) == 0


def test_k3_is_zero_where_equal_and_positive_elsewhere():
    assert float(k3_divergence(torch.tensor(-1.0), torch.tensor(-1.0))) == 0
    assert float(k3_divergence(torch.tensor(-1.0), torch.tensor(-2.0))) == pytest.approx(math.exp(-1) + 1 - 1)


def test_the_kl_figure_is_the_mean_over_tokens():
    logprobs, ref, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -9.0]]), torch.tensor([[True, False]])
    _, figures = grpo_loss(logprobs, logprobs, ref, torch.zeros(1), mask, beta=0.1)
    assert float(figures["kl"]) == pytest.approx(math.exp(-0.5) + 0.5 - 1)


def test_the_gradient_of_gspo_is_that_of_one_ratio_for_the_whole_completion():
    old, advantage = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)
    logprobs = (old + torch.tensor([[0.1, -0.2, 0.05]])).requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, _ = grpo_loss(logprobs, old, None, advantage, mask, beta=0.0, variant="gspo")
    [gradient] = torch.autograd.grad(loss, logprobs)
    ratio = math.exp((0.1 - 0.2 + 0.05) / 3)  # d/d logp_t of -ratio * A, where log ratio is a mean of three
    assert torch.allclose(gradient, torch.full((1, 3), -1.5 * ratio / 3, dtype=torch.float64))


def test_contradictory_arguments_are_refused():
    logprobs, old, ref, advantages, mask = batch()
    with pytest.raises(ValueError, match="beta"):
        grpo_loss(logprobs, old, None, advantages, mask, beta=0.04)
    with pytest.raises(ValueError, match="beta"):
        grpo_loss(logprobs, old, ref, advantages, mask, beta=0.0)
    with pytest.raises(ValueError, match="ppo"):
        grpo_loss(logprobs, old, ref, advantages, mask, variant="ppo")
    with pytest.raises(ValueError, match="max_completion_tokens"):
        grpo_loss(logprobs, old, ref, advantages, mask, variant="dr_grpo")
