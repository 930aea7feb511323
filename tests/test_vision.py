"""The vision tower's attention in segments is transformers' own, and takes one kernel call per block on a GPU."""

import pytest
import torch
from torch.testing import assert_close

import toy
from model import vision
from model.vision import attend_segments, use_segments


@pytest.mark.parametrize("bounds", [[0, 12], [0, 4, 8, 12], [0, 5, 7, 12, 13]], ids=str)
def test_segments_attend_to_themselves_alone(bounds):
    torch.manual_seed(0)
    states = torch.randn(3, 2, bounds[-1], 8, dtype=torch.float64, requires_grad=True)
    out = attend_segments(*states, bounds, 0.3)
    number = torch.bucketize(torch.arange(bounds[-1]), torch.tensor(bounds[1:]), right=True)
    scores = 0.3 * states[0] @ states[1].transpose(1, 2)
    probs = scores.masked_fill(number[:, None] != number, -torch.inf).softmax(-1)
    expected = (probs @ states[2]).transpose(0, 1)
    assert_close(out, expected, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(x.square().sum(), states, retain_graph=True)[0] for x in (out, expected))
    assert_close(*gradients, rtol=0, atol=1e-12)


def tower_and_pixels(size=(6, 10)):
    model = toy.model.build_model(toy.model.build_processor().tokenizer, seed=1).double()
    grid = torch.tensor([[1, *size], [1, 4, 4]])
    visual = model.model.visual
    width = visual.config.in_channels * visual.config.temporal_patch_size * visual.config.patch_size**2
    return visual, torch.randn(int(grid.prod(1).sum()), width, dtype=torch.float64), grid


def test_the_tower_sees_what_it_sees_under_sdpa():
    visual, pixels, grid = tower_and_pixels()
    expected = visual(pixels, grid).last_hidden_state
    use_segments(visual.blocks)
    assert visual.config._attn_implementation == vision.NAME
    assert_close(visual(pixels, grid).last_hidden_state, expected, rtol=0, atol=1e-12)


def test_bounds_that_are_ignored_fail_the_comparison(monkeypatch):
    visual, pixels, grid = tower_and_pixels()
    expected = visual(pixels, grid).last_hidden_state
    use_segments(visual.blocks)
    monkeypatch.setattr(
        vision, "attend_segments", lambda q, k, v, bounds, scale: attend_segments(q, k, v, [0, len(pixels)], scale)
    )
    assert (visual(pixels, grid).last_hidden_state - expected).abs().max() > 1e-3


def test_a_tower_without_segments_keeps_its_attention():
    blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    use_segments(blocks)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_one_call_is_as_close_as_segment_by_segment():
    torch.manual_seed(0)
    bounds = torch.tensor([0, 64, 128, 140, 400], device="cuda", dtype=torch.int32)
    states = torch.randn(3, 1, 4, 400, 80, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    options = {"scaling": 80**-0.5, "cu_seq_lens_q": bounds, "max_length_q": 260}
    out = vision.segment_attention(None, *states, None, **options)[0]
    exact = vision.segment_attention(None, *states.double(), None, **options)[0]
    assert (out - exact).abs().max() < 0.02
    gradients = [torch.autograd.grad(x.double().square().sum(), states, retain_graph=True)[0] for x in (out, exact)]
    assert (gradients[0] - gradients[1]).abs().max() < 0.1 * gradients[1].abs().max()
