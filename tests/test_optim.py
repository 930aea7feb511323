"""run.py: the learning rate; what else it holds is tested where it acts, in test_train, test_lora and test_survive."""

import pytest

from infra.run import learning_rate_factor


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
