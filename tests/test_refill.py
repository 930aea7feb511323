"""--refill: groups that teach nothing are drawn anew, by other prompts of their files, the same after a resume."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ALONE, CONFIG, argv_of, assert_equal, make_model, make_run, only_numbers, options, outcome, run_here

import toy.model
import toy.scenes
import train
from data import Sample, read_samples
from infra.parallel import World
from infra.prompts import PromptFeed
from infra.runlog import read_rows
from model.vlm import Prompt

HERE = Path(__file__).parent.parent
# A third of the prompts earn one value whatever is answered; the others earn by length, and at random too.
REWARD = """
def length(completion, answer, sample, rng):
    drawn = len(completion) % 5 / 4 + rng.random()
    return 0.5 if int(sample["id"].split("-")[-1]) % 3 == 0 else drawn
"""


def dull(prompt):
    """Whether all completions of this prompt earn the same."""
    return int(prompt.sample.id.split("-")[-1]) % 3 == 0


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    path = tmp_path_factory.mktemp("refill") / "mine.py"
    path.write_text(REWARD)
    return ["--rewards", f"{path}:length", "--beta", "0"]


# ---- which groups are drawn anew -----------------------------------------------------------------------------------


def rollout_of(paid, config, **changes):
    """A run and a rollout of groups of two that earn these rewards."""
    run = make_run(*make_model(), ALONE, [], group_size=2, **changes)
    weights = run.config.files[0].weights
    totals = [sum(w * value for w, value in zip(weights, row.values(), strict=True)) for row in paid]
    sample = Sample("s", "q", "a", (), "", False, "here")
    prompts = [Prompt({}, "", sample, None, None) for _ in range(len(paid) // 2)]
    return run, train.Rollout(
        prompts=prompts,
        completions=[[torch.tensor([number]), torch.tensor([number, 2])] for number in range(len(prompts))],
        draw_logprobs=torch.arange(len(paid) * 2).view(-1, 2).float(),
        texts=[f"text {number}" for number in range(len(paid))],
        paid=paid,
        totals=torch.tensor(totals),
        num_reward_errors=1,
    )


def test_groups_are_equal_in_total_or_in_each_reward_or_in_accuracy():
    names = {"rewards": ["iou", "format"]}
    earned = [(0, 0), (1, 1), (0, 1), (1, 0), (0.5, 1), (0.5, 0), (1, 1), (1, 1)]
    paid = [{"iou": float(a), "format": float(b)} for a, b in earned]
    run, rollout = rollout_of(paid, CONFIG, **names)
    assert train.equal_groups(run, rollout) == [1, 3]  # totals of 1 and 1, and of 2 and 2
    assert train.equal_groups(run, rollout, accuracy=True) == [2, 3]
    run, rollout = rollout_of(paid, CONFIG, **names, advantages="gdpo")
    assert train.equal_groups(run, rollout) == [3]
    assert train.rollout_figures(run, rollout)["groups_equal"] == 0.25
    run, rollout = rollout_of(paid, CONFIG, **names, advantages="gdpo", reward_weights=[1.0, 0.0])
    assert train.equal_groups(run, rollout) == [2, 3]  # a reward of no weight teaches nothing


def test_fresh_groups_take_their_places_and_nothing_else_moves():
    paid = [{"iou": value} for value in (0.0, 0.0, 1.0, 0.5, 0.0, 0.0)]
    _, rollout = rollout_of(paid, CONFIG, rewards=["iou"])
    fresh = replace(
        rollout, draw_logprobs=torch.full((6, 3), -1.0), texts=[f"fresh {number}" for number in range(6)],
        totals=torch.arange(10.0, 16), paid=[{"iou": float(number)} for number in range(6)],
        completions=[[torch.tensor([7])] * 2] * 3, num_reward_errors=2,
    )  # fmt: skip
    found = train.put_groups(rollout, [2, 0], fresh, 2)
    assert found.texts == ["fresh 2", "fresh 3", "text 2", "text 3", "fresh 0", "fresh 1"]
    assert found.totals.tolist() == [12, 13, 1, 0.5, 10, 11] and found.paid[0] == {"iou": 2.0}
    assert found.completions[1] is rollout.completions[1] and found.completions[2] is fresh.completions[0]
    assert found.draw_logprobs.tolist()[1:3] == [[-1, -1, -1], [4, 5, 0]]
    assert (found.num_thrown, found.num_reward_errors, len(found.prompts)) == (2, 3, 3)


# ---- which prompts come instead ------------------------------------------------------------------------------------


@pytest.fixture
def two_files(tmp_path):
    """Samples of two files, and the options of a run that takes twice as many of the first."""
    samples = []
    for number, name in enumerate(("a", "b")):
        toy.scenes.write_split(tmp_path, name, 12, seed=number)
        samples += read_samples(tmp_path / f"{name}.jsonl", tmp_path, has_boxes=True, file=number)
    mix = [{"file": str(tmp_path / "a.jsonl"), "share": 2}, {"file": str(tmp_path / "b.jsonl"), "share": 1}]
    (tmp_path / "mix.json").write_text(json.dumps(mix))
    return samples, replace(CONFIG, data="", mix=str(tmp_path / "mix.json"), template="plain", min_pixels=256)


def feed_of(two_files, tmp_path, world=ALONE):
    samples, config = two_files
    return PromptFeed(samples, toy.model.build_processor(), config, world, tmp_path / "bad.jsonl")


def ids(prompts):
    return [prompt.sample.source for prompt in prompts]


def test_replacements_are_of_the_files_asked_for_and_a_function_of_step_round_and_place(two_files, tmp_path):
    feed = feed_of(two_files, tmp_path)
    found = feed.replacements(3, 0, {0: 0, 1: 1, 3: 1})
    assert [prompt.sample.file for prompt in found] == [0, 1, 1]
    again = feed_of(two_files, tmp_path)  # as after a resume, and after other calls
    again.take(3)
    again.replacements(3, 1, {2: 0})
    assert ids(again.replacements(3, 0, {3: 1, 0: 0})) == [ids(found)[2], ids(found)[0]]
    everything = {
        (step, round): tuple(ids(feed.replacements(step, round, dict.fromkeys(range(4), 0))))
        for step in range(3)
        for round in range(3)
    }
    assert len(set(everything.values())) == 9 and all(len(set(row)) == 4 for row in everything.values())
    counts = Counter(source for row in everything.values() for source in row)
    assert set(counts.values()) == {3}  # 36 places, 12 samples: an order of its own, in which none comes too often


def test_two_ranks_get_what_one_would_in_their_places(two_files, tmp_path):
    alone = ids(feed_of(two_files, tmp_path).replacements(5, 2, {0: 1, 1: 0, 2: 0, 3: 1}))
    ranks = [feed_of(two_files, tmp_path, World(rank, 2, torch.device("cpu"), None)) for rank in (0, 1)]
    assert ids(ranks[0].replacements(5, 2, {0: 1, 1: 0})) == [alone[0], alone[2]]
    assert ids(ranks[1].replacements(5, 2, {1: 1})) == [alone[3]]


def test_a_broken_replacement_is_counted_in_its_step_and_again_after_a_resume(two_files, tmp_path):
    samples, _ = two_files
    [prompt] = feed_of(two_files, tmp_path).replacements(0, 0, {0: 0})
    Path(prompt.sample.images[0]).write_bytes(b"no image")
    feed, counts = feed_of(two_files, tmp_path), []
    for step in range(3):
        feed.take(step)
        feed.ahead[1].result()  # the next step is prepared before the replacements of this one
        if step == 0:
            [other] = feed.replacements(0, 0, {0: 0})
            assert other.sample.source != prompt.sample.source
        counts.append(feed.figures()["bad_samples"])
    assert counts == [1, 1, 1]
    [row] = read_rows(tmp_path / "bad.jsonl")
    assert row["step"] == 1 and row["source"] == prompt.sample.source


# ---- whole runs ----------------------------------------------------------------------------------------------------


def spied(argv, out, monkeypatch):
    """A run; its metrics, and for each step the prompts that were drawn and those that were kept."""
    drawn, kept, real = [], [], (train.draw, train.pay, train.step_advantages)
    monkeypatch.setattr(train, "draw", lambda run, prompts: drawn.append((run.step, prompts)) or real[0](run, prompts))
    monkeypatch.setattr(train, "step_advantages", lambda run, r: kept.append(r.prompts) or real[2](run, r))
    run_here(argv, out)
    return read_rows(out / "metrics.jsonl"), drawn, kept


def test_a_step_draws_until_its_groups_teach_and_counts_what_it_throws_away(
    checkpoint, scenes, reward, tmp_path, monkeypatch
):
    more = [
        "--refill",
        "rewards",
        "--refill_rounds",
        "4",
        "--prompts_per_step",
        "6",
        "--steps",
        "3",
        "--eval_every",
        "0",
    ]
    rows, drawn, kept = spied(argv_of(checkpoint, scenes, *reward, *more), tmp_path / "out", monkeypatch)
    assert sum(row["groups_thrown"] for row in rows) > 3
    for step, (row, prompts) in enumerate(zip(rows, kept, strict=True)):
        rounds = [prompts for number, prompts in drawn if number == step]
        assert row["groups_drawn"] == sum(map(len, rounds)) == 6 + row["groups_thrown"]
        for before, after in zip(rounds, rounds[1:], strict=False):
            assert len(after) == sum(map(dull, before))
        assert row["groups_equal"] == sum(map(dull, prompts)) / 6
        assert not any(map(dull, prompts)) or len(rounds) == 5  # it gives up after so many rounds


def test_the_seeds_of_rewards_differ_from_round_to_round(checkpoint, scenes, reward, tmp_path, monkeypatch):
    seeds, real = [], train.reward_call
    monkeypatch.setattr(train, "reward_call", lambda *given: seeds.append(real(*given).seed) or real(*given))
    more = ["--refill", "rewards", "--prompts_per_step", "6", "--steps", "2", "--eval_every", "0"]
    rows, _, _ = spied(argv_of(checkpoint, scenes, *reward, *more), tmp_path / "out", monkeypatch)
    assert len(set(seeds)) == len(seeds) == 3 * sum(row["groups_drawn"] for row in rows)


def test_the_shares_of_several_files_stay(two_files, checkpoint, reward, tmp_path, monkeypatch):
    mix = two_files[1].mix
    argv = ["--model", checkpoint, "--mix", mix, *reward, "--template", "plain", "--min_pixels", "256", "--steps", "3",
            "--prompts_per_step", "6", "--group_size", "3", "--max_completion_tokens", "6", "--eval_every", "0",
            "--held_out", "0", "--refill", "rewards"]  # fmt: skip
    rows, _, kept = spied(argv, tmp_path / "out", monkeypatch)
    assert sum(row["groups_thrown"] for row in rows) > 3
    assert all(Counter(prompt.sample.file for prompt in prompts) == {0: 4, 1: 2} for prompts in kept)


@pytest.mark.parametrize("more", [["--refill", "rewards"], ["--refill", "accuracy", "--advantages", "gdpo"]])
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_interrupted(checkpoint, scenes, reward, tmp_path, more):
    shared = argv_of(checkpoint, scenes, *reward, *more, "--eval_every", "0", "--save_every", "2")
    run_here([*shared, "--steps", "4"], tmp_path / "whole")
    run_here([*shared, "--steps", "3"], tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "step-000003").rename(tmp_path / "gone")  # as if it died after step 2
    run_here(["--resume", str(tmp_path / "cut"), "--steps", "4"])
    assert_equal(outcome(tmp_path / "cut", 4), outcome(tmp_path / "whole", 4))
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert sum(row["groups_thrown"] for row in rows[2:]) > 0 and all(row["grad_norm"] > 0 for row in rows)


def test_two_processes_draw_as_many_rounds_though_one_has_nothing_to_refill(checkpoint, scenes, reward, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE / "train.py")]
    more = ["--steps", "3", "--eval_every", "0", "--freeze_vision", "--draw_sharded", "--refill", "rewards"]
    command = [sys.executable, *launcher, *options(checkpoint, scenes, tmp_path / "out", *reward, *more)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert [row["groups_drawn"] - row["groups_thrown"] for row in rows] == [2, 2, 2]
    assert any(row["groups_thrown"] % 2 for row in rows)  # one prompt for each rank: only one of them drew again


def test_without_refill_nothing_is_drawn_again_and_nothing_is_counted(checkpoint, scenes, reward, tmp_path):
    argv = argv_of(checkpoint, scenes, *reward, "--steps", "1", "--eval_every", "0")
    run_here(argv, tmp_path / "out")
    [row] = only_numbers(read_rows(tmp_path / "out" / "metrics.jsonl"))
    assert not [name for name in row if name.startswith("groups_") and name != "groups_equal"]
