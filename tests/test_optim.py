"""optim.py: the learning rate of a step, gradients that are missing or not finite, and the seed of a step."""

import random

import pytest
import torch
from helpers import ALONE, CONFIG, make_model

from infra.optim import (
    apply_gradients,
    clip_gradients,
    learning_rate_factor,
    make_optimizers,
    seed_step,
    set_learning_rate,
)
from infra.parallel import World


@pytest.mark.parametrize(
    "schedule, factors",
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.8536, 0.5, 0.1464]),
        ("trapezoid", [1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_follows_its_schedule_after_the_warm_up(schedule, factors):
    found = [learning_rate_factor(step, 6, 2, schedule) for step in range(6)]
    assert found == pytest.approx([0.5, 1.0, *factors], abs=1e-4)
    assert learning_rate_factor(7, 8, 0, "trapezoid") == 0.5


def test_a_rate_is_scaled_from_the_one_its_optimizer_was_made_with():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([parameters[0]], lr=0.5), torch.optim.SGD([parameters[1]], lr=0.25)]
    assert set_learning_rate(optimizers, 0.5) == 0.25
    assert set_learning_rate(optimizers, 0.1) == pytest.approx(0.05)  # of 0.5, not of the 0.25 before
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(0.025)


def test_adamw_trains_everything_and_nothing_that_is_frozen():
    model, _ = make_model()
    model.model.visual.requires_grad_(False)
    [optimizer] = make_optimizers(model, CONFIG)
    taken = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert taken == {id(parameter) for name, parameter in model.named_parameters() if "visual" not in name}


def test_gradients_are_clipped_together_and_a_missing_one_becomes_zero():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert clip_gradients(parameters, 1.0) == pytest.approx(5.0)
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0], abs=1e-5)
    assert parameters[1].grad.tolist() == pytest.approx([0, 0.8], abs=1e-5)
    assert parameters[2].grad.tolist() == [0, 0]


@pytest.mark.parametrize("finite", [True, False])
def test_gradients_are_applied_if_they_are_finite_and_cleared_in_any_case(finite):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    apply_gradients([torch.optim.SGD([parameter], lr=0.5)], finite=finite)
    assert parameter.tolist() == ([0.5, 0.5] if finite else [1, 1]) and parameter.grad is None


def test_a_step_draws_the_same_again_and_no_two_steps_seeds_or_ranks_draw_the_same():
    second = World(1, 2, torch.device("cpu"), None)
    places = [(0, 0, ALONE), (0, 1, ALONE), (1, 0, ALONE), (0, 0, second)]

    def draws(place):
        generator = seed_step(*place)
        return torch.rand(3, generator=generator).tolist(), torch.rand(3).tolist(), random.random()

    found = [draws(place) for place in places]
    assert draws(places[0]) == found[0]
    assert all(len(set(map(str, column))) == 4 for column in zip(*found, strict=True))


def test_a_seed_may_be_as_large_as_a_date_and_time():
    first, second = (torch.rand(3, generator=seed_step(seed, 0, ALONE)) for seed in (20261126124500, 20261126124501))
    assert not torch.equal(first, second)
