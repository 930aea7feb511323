"""--ref_every: the reference of the KL penalty follows the policy, whether it trains weights or adapters."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    ALONE,
    CONFIG,
    argv_of,
    assert_equal,
    make_completions,
    make_model,
    make_prompts,
    only_numbers,
    outcome,
    run_here,
    set_rank,
    spawn,
)

import train
from infra.checkpoint import Packaging, load_reference_values, save_checkpoint
from infra.parallel import process_group, shard_model
from infra.policy import FollowingReference, load_policy, load_reference
from infra.runlog import read_rows
from model.vlm import load_any, trainable
from rollout import completion_logprobs

KINDS = {"weights": [], "adapters": ["--lora_rank", "4", "--lora_dropout", "0.2"]}


def argv(checkpoint, scenes, reward, kind, *more):
    return argv_of(checkpoint, scenes, *reward, *KINDS[kind], "--eval_every", "0", "--learning_rate", "5e-3", *more)


def metrics(out):
    return only_numbers(read_rows(out / "metrics.jsonl"))


# ---- whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_until_it_follows_for_the_first_time_the_reference_is_the_model_that_training_began_with(
    checkpoint, scenes, reward, tmp_path, kind
):
    run_here(argv(checkpoint, scenes, reward, kind, "--steps", "3"), tmp_path / "still")
    run_here(argv(checkpoint, scenes, reward, kind, "--steps", "3", "--ref_every", "3"), tmp_path / "following")
    found = metrics(tmp_path / "following")
    assert found == metrics(tmp_path / "still") and found[-1]["kl"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_policy_of_the_last_step_that_the_option_names(
    checkpoint, scenes, reward, tmp_path, kind, monkeypatch
):
    """Against the checkpoint of that step, loaded as a model of its own."""
    found, real = {}, train.reference_logprobs

    def spy(run, rows):
        scored = real(run, rows)
        found[run.step] = [(row.prompts, row.completions, values) for row, values in zip(rows, scored, strict=True)]
        return scored

    monkeypatch.setattr(train, "reference_logprobs", spy)
    more = ["--steps", "6", "--ref_every", "2", "--save_every", "1", "--keep_checkpoints", "9"]
    run_here(argv(checkpoint, scenes, reward, kind, *more), tmp_path / "out")
    for step, rows in found.items():
        place = tmp_path / "out" / "checkpoints" / f"step-{step // 2 * 2:06d}"
        model, _ = load_any(str(place if step >= 2 else checkpoint), min_pixels=256)
        for prompts, completions, values in rows:
            with torch.no_grad():
                scored = completion_logprobs(model, prompts, completions, banned_ids=banned(model))
            expected = torch.nn.utils.rnn.pad_sequence([row for part in scored for row in part], batch_first=True)
            torch.testing.assert_close(values, expected, rtol=0, atol=2e-5)
    kl = [row["kl"] for row in metrics(tmp_path / "out")]
    if kind == "weights":  # dropout would be in the policy and not in the reference
        assert kl[0] == kl[2] == kl[4] == 0
    assert min(kl[1], kl[3], kl[5]) > 1e-7


def banned(model):
    from model.vlm import banned_token_ids, load_processor

    return banned_token_ids(model, load_processor(model.config.name_or_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_interrupted(checkpoint, scenes, reward, tmp_path, kind):
    shared = argv(checkpoint, scenes, reward, kind, "--ref_every", "2", "--save_every", "1")
    run_here([*shared, "--steps", "6"], tmp_path / "whole")
    for stop in (1, 2, 3):  # before the reference has moved, when it is about to, and after
        run_here([*shared, "--steps", str(stop)], tmp_path / f"cut{stop}")
        run_here(["--resume", str(tmp_path / f"cut{stop}"), "--steps", "6"])
        assert_equal(outcome(tmp_path / f"cut{stop}", 6), outcome(tmp_path / "whole", 6))
    assert metrics(tmp_path / "whole")[3]["kl"] > 0


# ---- shards and dtypes ---------------------------------------------------------------------------------------------


def score(model, processor):
    with torch.no_grad():
        return completion_logprobs(model, make_prompts(processor, (1, 0)), make_completions(model, 2))


def shift(model, by):
    """Moves every weight a little, the same way whatever the shards."""
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.mul_(1 + by)


def equal(a, b):
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


def check_in_place(checkpoint, world, dtype):
    """A policy that moved on, scored as its reference, beside a second model with the old weights; and afterwards."""
    config = replace(CONFIG, model=checkpoint, min_pixels=256, dtype=dtype)
    policy, processor = load_policy(config, world)
    following = FollowingReference(policy, 2, torch.bfloat16 if dtype == "bf16" else torch.float32)
    old = score(load_reference(config, world), processor)
    shift(policy, 0.05)
    now = score(policy, processor)
    with following.in_place(1):
        assert equal(score(policy, processor), old)
    assert equal(score(policy, processor), now) and not equal(now, old)
    with following.in_place(2):  # it follows
        assert equal(score(policy, processor), now)
    shift(policy, 0.05)
    with following.in_place(3):
        assert equal(score(policy, processor), now)
    return policy, following


def two_processes(rank, port, checkpoint, directory):
    set_rank(rank, 2, port)
    with process_group(bf16=False) as world:
        for dtype in ("fp32", "bf16"):
            policy, following = check_in_place(checkpoint, world, dtype)
        packaging = Packaging(checkpoint, torch.float32, (256, 65536), {}, following.values)
        save_checkpoint(Path(directory) / "two", policy, [], {"step": 3}, world, packaging)


def test_the_reference_stands_in_place_of_the_policy_and_leaves_no_trace(checkpoint):
    check_in_place(checkpoint, ALONE, "fp32")
    with process_group(bf16=True) as world:
        check_in_place(checkpoint, world, "bf16")


def test_two_processes_follow_too_and_one_reads_what_they_save(checkpoint, tmp_path):
    spawn(two_processes, 2, checkpoint, str(tmp_path))
    model, _ = make_model(seed=8)
    model = shard_model(model, ALONE, compute_dtype=torch.float32)
    values = FollowingReference(model, 2, torch.bfloat16).values
    load_reference_values(tmp_path / "two", model, values, ALONE)
    with process_group(bf16=True) as world:
        _, following = check_in_place(checkpoint, world, "bf16")
    assert values.keys() == following.values.keys()
    assert all(value.equal(following.values[name]) for name, value in values.items())
