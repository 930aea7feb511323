"""grpo.py against hand arithmetic, float64 and the plain softmax."""

import math

import pytest
import torch
from torch.testing import assert_close

from grpo import group_advantages, grpo_loss, k3_divergence
from model.logprobs import linear_logprobs

torch.manual_seed(0)


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
    assert float(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("variant", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_losses_gradients_and_figures_of_micro_batches_add_up(variant):
    logprobs, old, ref, advantages, mask = batch()
    options = {"variant": variant, "max_completion_tokens": 7}
    whole, figures = grpo_loss(logprobs, old, ref, advantages, mask, **options)
    [gradient] = torch.autograd.grad(whole, logprobs)
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


def test_k3_is_zero_where_equal_and_positive_elsewhere():
    assert float(k3_divergence(torch.tensor(-1.0), torch.tensor(-1.0))) == 0
    assert float(k3_divergence(torch.tensor(-1.0), torch.tensor(-2.0))) == pytest.approx(math.exp(-1) + 1 - 1)


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


# ---- log-probs -----------------------------------------------------------------------------------------------------


def plain_logprobs(hidden, weight, ids, temperature, banned):
    logits = hidden @ weight.t() / temperature
    logits[:, banned] = -torch.inf
    logprobs = logits.log_softmax(1)
    finite = logprobs.masked_fill(logprobs.isinf(), 0)
    return logprobs.gather(1, ids[:, None])[:, 0], -(finite.exp() * finite * ~logprobs.isinf()).sum(1)


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_chunked_logprobs_entropies_and_gradients_are_those_of_the_full_softmax(chunk):
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    ids, banned = torch.tensor([0, 2, 10, 4, 4, 7, 1]), [3, 8]
    weights = torch.randn(2, 7, dtype=torch.float64)
    results = []
    for function in (
        lambda: linear_logprobs(hidden, weight, ids, temperature=0.7, banned_ids=banned, chunk=chunk),
        lambda: plain_logprobs(hidden, weight, ids, 0.7, banned),
    ):
        logprobs, entropies = function()
        gradients = torch.autograd.grad((weights[0] * logprobs + weights[1] * entropies).sum(), [hidden, weight])
        results.append([logprobs, entropies, *gradients])
    for ours, plain in zip(*results, strict=True):
        assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_logprobs_alone_backpropagate_and_a_frozen_head_gets_no_gradient():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    logprobs, _ = linear_logprobs(hidden, weight, torch.tensor([0, 1, 2]))
    logprobs.sum().backward()
    expected = torch.randn_like(hidden).copy_(hidden.detach()).requires_grad_()
    plain_logprobs(expected, weight, torch.tensor([0, 1, 2]), 1.0, [])[0].sum().backward()
    assert_close(hidden.grad, expected.grad)
    assert weight.grad is None


def test_bf16_states_give_fp32_logprobs_close_to_the_fp32_sum():
    hidden, weight, ids = torch.randn(9, 64) * 2, torch.randn(50, 64) / 4, torch.randint(50, (9,))
    low, _ = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), ids)
    exact, _ = linear_logprobs(hidden.bfloat16().float(), weight.bfloat16().float(), ids)
    assert low.dtype == torch.float32
    assert_close(low, exact, rtol=1e-5, atol=1e-5)


def test_a_banned_token_has_probability_zero_and_no_gradient():
    hidden, weight = torch.randn(4, 6), torch.randn(10, 6, requires_grad=True)
    logprobs, entropies = linear_logprobs(hidden, weight, torch.tensor([0, 1, 2, 3]), banned_ids=(9,))
    (logprobs + entropies).sum().backward()
    assert weight.grad[9].eq(0).all() and entropies.isfinite().all()
    assert (entropies <= math.log(9)).all()


def test_no_tokens_give_empty_results_that_still_backpropagate():
    hidden, weight = torch.randn(0, 6, requires_grad=True), torch.randn(10, 6, requires_grad=True)
    logprobs, _ = linear_logprobs(hidden, weight, torch.empty(0, dtype=torch.long))
    logprobs.sum().backward()
    assert logprobs.shape == (0,) and weight.grad.eq(0).all()


def test_temperature_zero_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="temperature"):
        linear_logprobs(torch.randn(1, 2), torch.randn(3, 2), torch.tensor([0]), temperature=0)
    with pytest.raises(ValueError, match="cannot predict"):
        linear_logprobs(torch.randn(2, 2), torch.randn(3, 2), torch.tensor([0]))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_bf16_products_come_back_in_fp32():
    hidden, weight = torch.randn(8, 64, device="cuda").bfloat16(), torch.randn(100, 64, device="cuda").bfloat16()
    ids = torch.arange(8, device="cuda")
    ours, _ = linear_logprobs(hidden, weight, ids)
    exact, _ = linear_logprobs(hidden.double(), weight.double(), ids)
    assert ours.dtype == torch.float32
    assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_the_kl_figure_is_the_mean_over_tokens():
    logprobs, ref, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -9.0]]), torch.tensor([[True, False]])
    _, figures = grpo_loss(logprobs, logprobs, ref, torch.zeros(1), mask, beta=0.1)
    assert float(figures["kl"]) == pytest.approx(math.exp(-0.5) + 0.5 - 1)


def test_a_wide_spread_of_rewards_and_float64_are_kept():
    rewards = torch.tensor([0.0, 100.0, 1e-9, 2e-9], dtype=torch.float64)
    advantages = group_advantages(rewards, 2)
    assert advantages.dtype == torch.float64
    assert advantages[1] == pytest.approx(50 / (100 / 2**0.5 + 1e-4)) and advantages[3] > advantages[2]


def test_the_gradient_of_gspo_is_that_of_one_ratio_for_the_whole_completion():
    old, advantage = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)
    logprobs = (old + torch.tensor([[0.1, -0.2, 0.05]])).requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, _ = grpo_loss(logprobs, old, None, advantage, mask, beta=0.0, variant="gspo")
    [gradient] = torch.autograd.grad(loss, logprobs)
    ratio = math.exp((0.1 - 0.2 + 0.05) / 3)  # d/d logp_t of -ratio * A, where log ratio is a mean of three
    assert torch.allclose(gradient, torch.full((1, 3), -1.5 * ratio / 3, dtype=torch.float64))


def test_gradients_in_bf16_are_close_to_those_in_float64():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16(), (torch.randn(500, 32) / 4).bfloat16()
    ids, results = torch.randint(500, (64,)), []
    for dtype in (torch.float64, torch.bfloat16):
        inputs = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        logprobs, _ = linear_logprobs(*inputs, ids, chunk=5)
        results.append(torch.autograd.grad(logprobs.sum(), inputs))
    for exact, low in zip(*results, strict=True):
        assert (exact - low).norm() < 0.003 * exact.norm()  # a hundred blocks accumulated in bf16: 0.011


def test_states_and_a_head_of_different_dtypes_are_refused():
    with pytest.raises(ValueError, match="cast one"):
        linear_logprobs(torch.randn(2, 4), torch.randn(5, 4).bfloat16(), torch.tensor([0, 1]))
