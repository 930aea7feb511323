"""grpo.py against hand arithmetic and a loss written out token by token."""

import math
import statistics

import pytest
import torch
from torch.testing import assert_close

from grpo import VARIANTS, gdpo_advantages, gdpo_sums, group_advantages, grpo_loss, k3_divergence


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


def scores(values):
    """(value - mean) / (unbiased deviation + 1e-4), in Python floats."""
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return [(value - mean) / (deviation + 1e-4) for value in values]


def test_gdpo_compares_each_reward_by_itself_then_the_sums_over_the_batch():
    generator = torch.Generator().manual_seed(3)
    rewards = torch.rand(12, 3, generator=generator, dtype=torch.float64)
    rewards[4:8, 1] = 0.5  # equal in one group
    weights = [1.0, 0.5, 2.0]
    columns = []
    for column in rewards.T.tolist():
        parts = [column[start : start + 4] for start in (0, 4, 8)]
        columns.append([value for part in parts for value in scores(part)])
    sums = [sum(w * column[n] for w, column in zip(weights, columns, strict=True)) for n in range(12)]
    found = gdpo_sums(rewards, torch.tensor(weights, dtype=torch.float64), 4)
    assert_close(found, torch.tensor(sums, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(gdpo_advantages(found), torch.tensor(scores(sums), dtype=torch.float64), rtol=0, atol=1e-12)
    whole = {"sum_of_squares": float(found.square().sum()), "num_completions": 12}
    parts = [gdpo_advantages(found[:8], **whole), gdpo_advantages(found[8:], **whole)]  # as two ranks would
    assert_close(torch.cat(parts), gdpo_advantages(found), rtol=0, atol=1e-15)


def test_under_gdpo_two_rewards_that_agree_weigh_more_than_one():
    # Two groups of two: rewards (0, 0) against (1, 1), and (0, 0) against (1, 0). Their totals are 0, 2 and 0, 1.
    rewards = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    totals = group_advantages(rewards.sum(1), 2)
    assert_close(totals[:2], totals[2:], rtol=1e-3, atol=0)
    advantages = gdpo_advantages(gdpo_sums(rewards, torch.ones(2), 2))
    # By itself a reward gives 0.5 / (sqrt(0.5) + 1e-4) = 0.707; the sums are 2, 2, 1, 1 times that, of deviation 1.29.
    assert_close(advantages, torch.tensor([-1.0954, 1.0954, -0.5477, 0.5477]), rtol=1e-3, atol=0)


def test_under_gdpo_equal_rewards_give_exact_zeros_and_equal_totals_do_not():
    rewards = torch.tensor([[0.1, 0.7]] * 3 + [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    advantages = gdpo_advantages(gdpo_sums(rewards, torch.tensor([1.0, 0.5]), 3))
    assert advantages[:3].eq(0).all() and advantages[3:].ne(0).all()
    assert group_advantages(rewards.sum(1), 3)[3:].eq(0).all()


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
            if variant == "cispo":
                loss = -min(ratio, 1 + high) * advantage * float(logprobs[row, t])
            if variant == "sapo":
                temperature = 1.0 if advantage > 0 else 1.05
                loss = -4 / temperature / (1 + math.exp(-temperature * (ratio - 1))) * advantage
            if ref is not None:
                gap = float(ref[row, t] - logprobs[row, t])
                loss += beta * (math.exp(gap) - gap - 1)
            losses.append(loss)
        weights = {"dapo": 1 / tokens, "cispo": 1 / tokens, "dr_grpo": 1 / (len(mask) * (limit or 1))}
        weight = weights.get(variant, 1 / (length * len(mask)))
        total += sum(losses) * weight
    return total


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_is_the_sum_over_tokens_written_out(variant, beta):
    logprobs, old, ref, advantages, mask = batch()
    ref = ref if beta else None
    loss, _ = grpo_loss(logprobs, old, ref, advantages, mask, clip_low=0.1, clip_high=0.3, beta=beta, variant=variant,
                        max_completion_tokens=7)  # fmt: skip
    expected = slow_loss(logprobs, old, ref, advantages, mask, low=0.1, high=0.3, beta=beta, variant=variant, limit=7)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
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


@pytest.mark.parametrize("variant, like", [("cispo", "dapo"), ("sapo", "grpo")])
def test_on_the_first_pass_the_newer_clips_have_the_gradient_of_the_older(variant, like):
    logprobs, _, _, advantages, mask = batch()
    gradients = []
    for name in (variant, like):
        loss, figures = grpo_loss(logprobs, logprobs.detach(), None, advantages, mask, beta=0, variant=name)
        gradients += torch.autograd.grad(loss, logprobs)
        assert figures["clip_low"] == 0 and figures["clip_high"] == 0
    assert_close(gradients[0], gradients[1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_finite_differences(variant):
    logprobs, old, ref, advantages, mask = batch()
    options = {"variant": variant, "max_completion_tokens": 7, "clip_high": 0.3}
    [gradient] = torch.autograd.grad(grpo_loss(logprobs, old, ref, advantages, mask, **options)[0], logprobs)
    weight = (logprobs.detach() - old).exp().clamp(max=1.3)

    def loss_at(values):
        loss = grpo_loss(values, old, ref, advantages, mask, **options)[0]
        if variant == "cispo":  # its weight is a constant for the gradient: take it as it is at the point
            moved = (values - old).exp().clamp(max=1.3)
            loss = loss + torch.where(mask, (moved - weight) * advantages[:, None] * values, 0.0).sum() / mask.sum()
        return float(loss)

    for row, column in mask.nonzero().tolist():
        step = torch.zeros_like(old)
        step[row, column] = 1e-6
        slope = (loss_at(logprobs.detach() + step) - loss_at(logprobs.detach() - step)) / 2e-6
        assert slope == pytest.approx(float(gradient[row, column]), abs=1e-8)
    assert (gradient[~mask] == 0).all()


def test_under_cispo_a_clipped_token_keeps_its_gradient_and_is_counted_whatever_its_advantage():
    logprobs = torch.tensor([[1.0, -1.0], [1.0, 0.0]], requires_grad=True)  # ratios e, 1/e, e, 1
    mask = torch.ones(2, 2, dtype=torch.bool)
    advantages = torch.tensor([1.0, -1.0])
    loss, figures = grpo_loss(logprobs, torch.zeros(2, 2), None, advantages, mask, beta=0, variant="cispo")
    [gradient] = torch.autograd.grad(loss, logprobs)
    assert_close(gradient, torch.tensor([[-1.2, -1 / math.e], [1.2, 1.0]]) / 4)
    assert float(figures["clip_high"]) == 0.5 and figures["clip_low"] == 0


def test_under_sapo_a_token_far_off_fades_and_a_worse_one_fades_sooner():
    logprobs = torch.tensor([[math.log(6.0)], [math.log(6.0)]], requires_grad=True)
    mask = torch.ones(2, 1, dtype=torch.bool)
    loss, figures = grpo_loss(
        logprobs, torch.zeros(2, 1), None, torch.tensor([1.0, -1.0]), mask, beta=0, variant="sapo"
    )
    [gradient] = torch.autograd.grad(loss, logprobs)
    slopes = [4 * math.exp(-5 * t) / (1 + math.exp(-5 * t)) ** 2 for t in (1.0, 1.05)]  # 4 s (1 - s) at ratio 6
    assert_close(gradient[:, 0], torch.tensor([-slopes[0], slopes[1]]) * 6 / 2)
    assert slopes[1] < slopes[0] < 0.03 and figures["clip_high"] == figures["clip_low"] == 0


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
