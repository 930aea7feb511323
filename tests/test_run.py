"""run.py: updates that are skipped, runs that are told to stop, and which checkpoints are written."""

import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import ALONE, learn, make_model, make_rollout, make_run, options, run_here

import train
from data import Sample
from infra import parallel
from infra.run import Run
from infra.runlog import append_rows, read_rows
from infra.terminal import Terminal
from model.vlm import Prompt

# ---- updates that are skipped --------------------------------------------------------------------------------------


def updatable(loss, gradient):
    """A run of one parameter that has this gradient, after Run.update of this loss; and the norm."""
    run = make_run(*make_model(), ALONE, [])
    run.policy = torch.nn.Linear(1, 1, bias=False)
    run.policy.weight.data.fill_(1.0)
    run.policy.weight.grad = torch.tensor([[gradient]])
    run.optimizers = [torch.optim.SGD(run.policy.parameters(), lr=0.5)]
    return run, run.update(loss)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "loss, gradient, skipped", [(1.0, 1.0, 0), (NAN, 1.0, 1), (INF, 1.0, 1), (1.0, NAN, 1), (1.0, INF, 1)]
)
def test_an_update_is_skipped_and_counted_if_the_loss_or_the_gradient_is_not_finite(loss, gradient, skipped):
    run, norm = updatable(loss, gradient)
    assert run.figures["skipped_updates"] == skipped and (norm == gradient or norm != norm)
    assert run.policy.weight.item() == (1.0 if skipped else 0.5) and run.policy.weight.grad is None


def test_a_step_with_an_advantage_that_is_not_finite_is_counted_and_changes_no_weight():
    model, processor = make_model()
    rollout = make_rollout(model, processor, ALONE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = make_run(model, processor, ALONE, [torch.optim.SGD(model.parameters(), lr=0.1)], beta=0.0)
    learn(run, replace(rollout, totals=rollout.totals * torch.tensor([torch.inf, *[1.0] * 11])))
    assert run.figures["skipped_updates"] == 1
    assert all(p.equal(before[name]) and p.grad is None for name, p in model.named_parameters())


def stepping_run(out, step, **changes):
    """A run in `out` after that step, which saves nothing and logs to its files."""
    run = make_run(*make_model(), ALONE, [], out=out, **changes)
    run.step, run.num_steps = step, 100
    run.keeper = SimpleNamespace(newest=lambda: "step-000003", after_step=lambda *a, **o: None)
    run.log = SimpleNamespace(
        metrics=lambda step, figures: append_rows(out / "metrics.jsonl", [figures]),
        terminal=Terminal(run.config, first=False),
    )
    run.feed = SimpleNamespace(figures=dict)
    run.stop = SimpleNamespace(agreed=lambda world: False)
    return run


def prompt_of(name):
    return Prompt({}, "", Sample(name, "q", "a", (), "", False, "here"), None, None)


def end_step(run, *, bad):
    run.figures = {"skipped_updates": float(bad)}
    run.end_step({"loss": NAN if bad else 0.0, "grad_norm": 1.0}, [prompt_of("a"), prompt_of("b")])


def test_steps_without_an_update_are_written_down_and_too_many_in_a_row_stop_the_run_also_after_a_resume(tmp_path):
    run = stepping_run(tmp_path, 0, max_bad_steps=3)
    for bad in (True, True, False, True, True):  # no three in a row
        end_step(run, bad=bad)
    rows = read_rows(tmp_path / "bad_steps.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    expected = {"step": 1, "loss": None, "grad_norm": 1.0, "skipped_updates": 1.0, "samples": ["a", "b"]}
    assert rows[0] == expected
    resumed = stepping_run(tmp_path, 5, max_bad_steps=3)
    with pytest.raises(
        ValueError, match=r"3 steps in a row, the last of them 6.*bad_steps.jsonl.*step-000003.*--max_bad"
    ):
        end_step(resumed, bad=True)


def test_a_good_step_after_a_resume_starts_the_count_again(tmp_path):
    run = stepping_run(tmp_path, 0, max_bad_steps=3)
    for bad in (True, True):
        end_step(run, bad=bad)
    run = stepping_run(tmp_path, 2, max_bad_steps=3)
    for bad in (False, True, True):
        end_step(run, bad=bad)
    with pytest.raises(ValueError, match="3 steps in a row, the last of them 6"):
        end_step(run, bad=True)


# ---- the end of a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_a_run_told_to_stop_finishes_its_step_saves_and_says_how_to_continue(
    checkpoint, scenes, tmp_path, monkeypatch, capsys, signals
):
    def interrupted(run):
        for number in signals:  # a scheduler sends SIGTERM to every process, and a launcher passes it on as well
            os.kill(os.getpid(), number)
        return real_step(run)

    real_step, out = train.train_step, tmp_path / "out"
    monkeypatch.setattr(train, "train_step", interrupted)
    assert run_here(options(checkpoint, scenes, out, "--steps", "5", "--eval_every", "0")) == parallel.STOPPED == 3
    assert len(read_rows(out / "metrics.jsonl")) == 1 and (out / "checkpoints" / "step-000001").exists()
    assert f"--resume {out}" in capsys.readouterr().out


def test_a_run_that_is_done_returns_0_and_says_so_when_it_is_resumed(checkpoint, scenes, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_here(options(checkpoint, scenes, out, "--steps", "2", "--eval_every", "0")) == 0
    before = (out / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run_here(["--resume", str(out)]) == 0
    assert f"{out} has done its 2 steps: give more --steps to continue it" in capsys.readouterr().out
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("save_every, saved", [(0, [3, 4]), (2, [2, 3, 4])])
def test_without_save_every_only_the_best_and_the_last_step_are_saved(
    checkpoint, scenes, tmp_path, monkeypatch, save_every, saved
):
    scores = iter([0.1, 0.0, 0.05, 0.4, 0.2])  # before the first step and after each
    monkeypatch.setattr(Run, "evaluate", lambda run: next(scores))
    more = ["--steps", "4", "--eval_every", "1", "--save_every", str(save_every), "--keep_checkpoints", "9"]
    run_here(options(checkpoint, scenes, tmp_path / "out", *more))
    found = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert found == [f"step-{step:06d}" for step in saved]
    assert (tmp_path / "out" / "best").resolve().name == "step-000003"
