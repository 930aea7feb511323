"""run.py, feed.py, memory.py, journal.py: learning rate, rows of every rank, samples set aside, files of a run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import toy
import train
from data import read_samples, step_indices
from feed import PromptFeed
from journal import RunLog, _drop_after, read_rows
from memory import memory_estimate, row_budget
from parallel import World
from run import learning_rate_factor, load_policy
from test_parallel import ALONE, CONFIG, make_model, make_rollout
from test_train import run
from train import make_rows
from vlm import blank_prompt


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


def test_a_line_that_a_killed_process_left_half_written_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    _drop_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_completions_take_a_bounded_space_and_the_newest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("journal.MAX_COMPLETIONS_BYTES", 1000)
    log = RunLog(tmp_path, CONFIG, ALONE, 0)
    for step in range(1, 101):
        log.write("completions.jsonl", step, {"text": "x" * 80})
        log.write("metrics.jsonl", step, {"text": "x" * 80})
    kept = [tmp_path / "completions.1.jsonl", tmp_path / "completions.jsonl"]
    whole = [[row["step"] for row in read_rows(path)] for path in kept]
    steps = sum(whole, [])
    assert steps == list(range(101 - len(steps), 101)) and 10 <= len(steps) < 25
    assert sum(path.stat().st_size for path in kept) < 2300
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100
    resumed = steps[3]  # before the file was changed last
    log = RunLog(tmp_path, CONFIG, ALONE, resumed)
    log.write("completions.jsonl", resumed + 1, {"text": "x" * 80})
    assert [row["step"] for path in kept for row in read_rows(path)] == [*steps[:4], resumed + 1]
    for step in range(resumed + 2, 101):  # repeated from there, the files are what they were
        log.write("completions.jsonl", step, {"text": "x" * 80})
    assert [[row["step"] for row in read_rows(path)] for path in kept] == whole


def test_only_the_newest_checkpoints_and_the_best_are_kept(checkpoint, scenes, tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.2, 0.3, 0.4])
    monkeypatch.setattr(train, "evaluate_sets", lambda *arguments, **named: next(scores))
    run(
        checkpoint,
        scenes,
        tmp_path / "out",
        "--steps",
        "4",
        "--eval_every",
        "1",
        "--save_every",
        "1",
        "--keep_checkpoints",
        "1",
    )
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["step-000001", "step-000004"]
    assert (tmp_path / "out" / "best").resolve().name == "step-000001"


def test_an_image_that_breaks_while_running_is_set_aside_and_named(checkpoint, tmp_path):
    toy.write_split(tmp_path, "train", 12, seed=3)
    image = tmp_path / "train" / "00005.png"
    image.write_bytes(image.read_bytes()[:600])
    rows = run(
        checkpoint,
        tmp_path,
        tmp_path / "out",
        "--steps",
        "6",
        "--eval_every",
        "0",
        "--eval_data",
        str(tmp_path / "train.jsonl"),
    )
    assert rows[-1]["bad_samples"] == 1
    [bad] = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert bad["source"].endswith("train.jsonl:6") and "00005.png" in bad["reason"]


def test_too_many_broken_images_stop_the_run(checkpoint, tmp_path):
    toy.write_split(tmp_path, "train", 12, seed=3)
    for image in list((tmp_path / "train").iterdir())[:6]:
        image.write_bytes(image.read_bytes()[:600])
    with pytest.raises(ValueError, match="samples used are broken, more than 1%"):
        run(
            checkpoint,
            tmp_path,
            tmp_path / "out",
            "--steps",
            "6",
            "--eval_every",
            "0",
            "--eval_data",
            str(tmp_path / "train.jsonl"),
        )


@pytest.mark.parametrize("box_space, scale", [("", 1), ("thousand", 1000 / 64)])
def test_a_run_trains_on_boxes_in_the_space_asked_for_and_says_so(
    checkpoint, scenes, tmp_path, capsys, box_space, scale
):
    config = replace(CONFIG, model=checkpoint, template="plain", min_pixels=256, box_space=box_space)
    _, processor = load_policy(config, ALONE)
    said = capsys.readouterr().out
    assert "256 to 1,003,520 pixels each; boxes: " + ("0..1000" if box_space else "pixels of the resized image") in said
    samples = read_samples(scenes / "train.jsonl", scenes)
    for prompt in PromptFeed(samples, processor, config, ALONE, tmp_path / "log", 1).take(0):
        expected = [side * scale for side in json.loads(prompt.sample.answer)]
        assert json.loads(prompt.answer) == pytest.approx(expected)


def test_a_rank_with_less_to_do_adds_rows_of_a_blank_prompt(monkeypatch):
    model, processor = make_model()
    rollout = make_rollout(model, processor, ALONE)
    monkeypatch.setattr("memory.all_sum", lambda values, world, largest: {"rows": 3.0})  # another rank has three
    rows = make_rows(rollout, CONFIG, World(0, 2, torch.device("cpu"), None), blank_prompt(processor), 4096)
    assert len(rows) == 3 and [len(row.members) for row in rows] == [12, 0, 0]
    assert all(any("pixel_values" in prompt for prompt in row.prompts) for row in rows)


def test_row_tokens_auto_fill_what_memory_leaves_and_start_lower_where_nothing_can_be_repeated(monkeypatch):
    model, _ = make_model()
    config = replace(CONFIG, row_tokens="auto")
    sizes = {}
    for gigabytes in (0.001, 1.0, 2.0, 10_000):
        monkeypatch.setattr("memory.device_memory_gb", lambda device, g=gigabytes: g)
        sizes[gigabytes] = row_budget(config, model, ALONE, reference=False).tokens
    assert sizes[0.001] == 256 and 256 < sizes[1.0] < sizes[2.0] < sizes[10_000] == 65_536
    estimate = memory_estimate(model, ALONE, config, reference=False, row_tokens=sizes[1.0])
    assert 0.85 < sum(estimate.values()) <= 0.9
    monkeypatch.setattr("memory.device_memory_gb", lambda device: 1.0)
    monkeypatch.setattr("memory.all_sum", lambda values, world, largest: values)
    two = row_budget(config, model, World(0, 2, torch.device("cpu"), None), reference=False)
    assert abs(two.tokens - sizes[1.0] / 2) <= 1 and not two.may_shrink


def test_prompts_are_prepared_one_step_ahead_and_none_beyond_the_last(checkpoint, tmp_path):
    toy.write_split(tmp_path, "train", 12, seed=3)
    samples = read_samples(tmp_path / "train.jsonl", tmp_path, has_boxes=True)
    processor, config = toy.build_processor(), replace(CONFIG, template="plain", min_pixels=256)
    built = []
    feed = PromptFeed(samples, processor, config, ALONE, tmp_path / "bad.jsonl", steps=2)
    feed._build = lambda index, real=feed._build: built.append(index) or real(index)
    for step in (0, 1):
        expected = step_indices(len(samples), config.prompts_per_step, step, config.seed)
        assert [prompt.sample for prompt in feed.take(step)] == [samples[index] for index in expected]
    feed.thread.shutdown()
    assert len(built) == 2 * config.prompts_per_step
    ahead = PromptFeed(samples, processor, config, ALONE, tmp_path / "bad.jsonl", steps=9)
    ahead.take(3)
    ahead.thread.shutdown()
    assert ahead.ahead[0] == 4 and len(ahead.ahead[1].result()[0]) == config.prompts_per_step


def test_a_sample_found_broken_ahead_of_its_step_is_counted_in_its_step(tmp_path):
    toy.write_split(tmp_path, "train", 12, seed=3)
    samples = read_samples(tmp_path / "train.jsonl", tmp_path, has_boxes=True)
    config = replace(CONFIG, template="plain", min_pixels=256)
    broken = step_indices(12, config.prompts_per_step, 1, config.seed)[0]
    Path(samples[broken].images[0]).write_bytes(b"no image")
    feed = PromptFeed(samples, toy.build_processor(), config, ALONE, tmp_path / "bad.jsonl", steps=9)
    feed.take(0)
    feed.ahead[1].result()
    assert feed.figures() == {"bad_samples": 0.0}
    feed.take(1)
    assert feed.figures() == {"bad_samples": 1.0}
