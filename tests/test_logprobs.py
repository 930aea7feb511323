"""model/logprobs.py against the full softmax, in float64 and in lower precisions."""

import math

import pytest
import torch
from torch.testing import assert_close

from model.logprobs import linear_logprobs

torch.manual_seed(0)


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


def test_logprobs_alone_backpropagate_and_the_gradient_of_a_frozen_head_is_not_computed(monkeypatch):
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    logprobs, _ = linear_logprobs(hidden, weight, torch.tensor([0, 1, 2]))
    with monkeypatch.context() as patches:
        patches.setattr(torch, "mm", lambda *inputs, out: pytest.fail("the product that is the head's gradient"))
        logprobs.sum().backward()
    expected = hidden.detach().clone().requires_grad_()
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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_bf16_products_come_back_in_fp32():
    hidden, weight = torch.randn(8, 64, device="cuda").bfloat16(), torch.randn(100, 64, device="cuda").bfloat16()
    ids = torch.arange(8, device="cuda")
    ours, _ = linear_logprobs(hidden, weight, ids)
    exact, _ = linear_logprobs(hidden.double(), weight.double(), ids)
    assert ours.dtype == torch.float32
    assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
