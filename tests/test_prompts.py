"""feed.py: prompts one step ahead, samples set aside, boxes in the space asked for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ALONE, CONFIG, run

import toy
import toy.model
import toy.scenes
from data import read_samples, step_indices
from infra.prompts import PromptFeed
from infra.run import load_policy


def run_with_broken_images(checkpoint, directory, broken):
    """Six steps on twelve scenes, so many of their images cut short."""
    toy.scenes.write_split(directory, "train", 12, seed=3)
    for image in sorted((directory / "train").iterdir())[5 : 5 + broken]:
        image.write_bytes(image.read_bytes()[:600])
    more = ["--steps", "6", "--eval_every", "0", "--eval_data", str(directory / "train.jsonl")]
    return run(checkpoint, directory, directory / "out", *more)


def test_an_image_that_breaks_while_running_is_set_aside_and_named(checkpoint, tmp_path):
    rows = run_with_broken_images(checkpoint, tmp_path, 1)
    assert rows[-1]["bad_samples"] == 1
    [bad] = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert bad["source"].endswith("train.jsonl:6") and "00005.png" in bad["reason"]


def test_too_many_broken_images_stop_the_run(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="samples used are broken, more than 1%"):
        run_with_broken_images(checkpoint, tmp_path, 6)


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


def test_prompts_are_prepared_one_step_ahead_and_none_beyond_the_last(checkpoint, tmp_path):
    toy.scenes.write_split(tmp_path, "train", 12, seed=3)
    samples = read_samples(tmp_path / "train.jsonl", tmp_path, has_boxes=True)
    processor, config = toy.model.build_processor(), replace(CONFIG, template="plain", min_pixels=256)
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
    toy.scenes.write_split(tmp_path, "train", 12, seed=3)
    samples = read_samples(tmp_path / "train.jsonl", tmp_path, has_boxes=True)
    config = replace(CONFIG, template="plain", min_pixels=256)
    broken = step_indices(12, config.prompts_per_step, 1, config.seed)[0]
    Path(samples[broken].images[0]).write_bytes(b"no image")
    feed = PromptFeed(samples, toy.model.build_processor(), config, ALONE, tmp_path / "bad.jsonl", steps=9)
    feed.take(0)
    feed.ahead[1].result()
    assert feed.figures() == {"bad_samples": 0.0}
    feed.take(1)
    assert feed.figures() == {"bad_samples": 1.0}
