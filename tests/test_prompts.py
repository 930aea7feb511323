"""infra/prompts.py: prompts one step ahead, samples set aside, boxes in the space asked for."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import ALONE, CONFIG, run

import toy.model
import toy.scenes
from data import Sample, mixed_indices, read_samples, share_out, step_indices
from infra.policy import load_policy
from infra.prompts import PromptFeed, check_truths, seeded_sample, split_held_out


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
    for prompt in PromptFeed(samples, processor, config, ALONE, tmp_path / "log").take(0, last=True):
        expected = [side * scale for side in json.loads(prompt.sample.answer)]
        assert json.loads(prompt.answer) == pytest.approx(expected)


def test_prompts_are_prepared_one_step_ahead_and_none_beyond_the_last(checkpoint, tmp_path):
    toy.scenes.write_split(tmp_path, "train", 12, seed=3)
    samples = read_samples(tmp_path / "train.jsonl", tmp_path, has_boxes=True)
    processor, config = toy.model.build_processor(), replace(CONFIG, template="plain", min_pixels=256)
    built = []
    feed = PromptFeed(samples, processor, config, ALONE, tmp_path / "bad.jsonl")
    feed._build = lambda index, real=feed._build: built.append(index) or real(index)
    for step in (0, 1):
        expected = step_indices(len(samples), config.prompts_per_step, step, config.seed)
        assert [prompt.sample for prompt in feed.take(step, last=step == 1)] == [samples[index] for index in expected]
    feed.thread.shutdown()
    assert len(built) == 2 * config.prompts_per_step
    ahead = PromptFeed(samples, processor, config, ALONE, tmp_path / "bad.jsonl")
    ahead.take(3)
    ahead.thread.shutdown()
    assert ahead.ahead[0] == 4 and len(ahead.ahead[1].result()[0]) == config.prompts_per_step


def test_a_sample_found_broken_ahead_of_its_step_is_counted_in_its_step(tmp_path):
    toy.scenes.write_split(tmp_path, "train", 12, seed=3)
    samples = read_samples(tmp_path / "train.jsonl", tmp_path, has_boxes=True)
    config = replace(CONFIG, template="plain", min_pixels=256)
    broken = step_indices(12, config.prompts_per_step, 1, config.seed)[0]
    Path(samples[broken].images[0]).write_bytes(b"no image")
    feed = PromptFeed(samples, toy.model.build_processor(), config, ALONE, tmp_path / "bad.jsonl")
    feed.take(0)
    feed.ahead[1].result()
    assert feed.figures() == {"bad_samples": 0.0}
    feed.take(1)
    assert feed.figures() == {"bad_samples": 1.0}


def test_the_subset_of_an_evaluation_is_a_seeded_shuffle_and_a_limit_of_0_or_more_takes_all():
    everything = list(range(10))
    chosen = seeded_sample(everything, 4, 42)
    shuffled = list(range(10))
    random.Random(42).shuffle(shuffled)  # as VLM-R1 draws its 2,000
    assert chosen == shuffled[:4] and everything == list(range(10)) and seeded_sample(everything, 4, 43) != chosen
    assert seeded_sample(everything, 0, 42) == seeded_sample(everything, 10, 42) == everything


def test_cosine_length_takes_a_box_only_beside_a_reward_that_moves_it():
    text, box = (Sample("s", "q", answer, (), "", False, "f.jsonl:3") for answer in ("[1, 2]", "[1, 2, 30, 40]"))
    check_truths([text, replace(box, has_boxes=True)], ["cosine_length"])
    with pytest.raises(ValueError, match="f.jsonl:3: the truth .* is a box.*: name iou beside cosine_length"):
        check_truths([box], ["format", "cosine_length"])


def test_held_out_samples_are_at_most_a_twentieth_and_are_not_trained_on():
    samples = list(range(100))
    rest, held_out = split_held_out(samples, 200, 0)
    assert len(held_out) == 5 and sorted(rest + held_out) == samples and rest == sorted(rest)
    assert len(split_held_out(samples, 3, 0)[1]) == 3 and split_held_out(samples, 0, 0) == (samples, [])
    assert split_held_out(samples, 200, 0) == (rest, held_out) != split_held_out(samples, 200, 1)


# ---- the order in which several files are mixed ---------------------------------------------------------------------


def test_shares_are_given_out_next_to_exactly_and_taken_from_none():
    # By hand, votes 2, 1, 1 over 1, 3, 5, ...: 2 | 1, 1 | 2/3 | 2/5 | 1/3, 1/3 ..., the first file first where equal.
    assert [share_out(total, [2, 1, 1]) for total in range(5)] == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
        [2, 1, 1],
    ]
    generator = np.random.default_rng(0)
    for _ in range(50):
        shares = (10.0 ** generator.uniform(-2, 2, generator.integers(1, 7))).tolist()
        before = [0] * len(shares)
        for total in range(300):
            counts = share_out(total, shares)
            assert sum(counts) == total and all(b <= c <= b + 1 for b, c in zip(before, counts, strict=True))
            quotas = [total * share / sum(shares) for share in shares]
            assert max(abs(c - q) for c, q in zip(counts, quotas, strict=True)) <= (len(shares) + 1) / 2
            before = counts


def test_a_step_holds_the_mix_and_each_file_is_visited_whole_before_it_repeats():
    sizes, taken = [100, 7, 40], []
    for step in range(20):
        indices = mixed_indices(sizes, [0.5, 0.25, 0.25], 16, step, seed=3)
        assert Counter(np.searchsorted([100, 107], indices, side="right").tolist()) == {0: 8, 1: 4, 2: 4}
        taken += indices
    small = [index for index in taken if 100 <= index < 107]  # 80 of a file of 7
    for start in range(0, 77, 7):
        assert sorted(small[start : start + 7]) == list(range(100, 107))
    assert small[:7] != small[7:14]
    large = [index for index in taken if index < 100]
    assert len(set(large[:100])) == 100 and large[:100] != list(range(100))
    both = mixed_indices([9, 9], [1, 1], 18, 0, seed=3)
    assert both[:9] != [index - 9 for index in both[9:]]  # an order for each
    assert mixed_indices(sizes, [0.5, 0.25, 0.25], 16, 5, seed=4) != taken[80:96]


def test_an_odd_mix_comes_out_right_over_the_steps_though_none_holds_it():
    counts = Counter()
    for step in range(70):
        indices = mixed_indices([10, 10, 10], [5, 1, 1], 2, step, seed=0)
        assert len(indices) == 2
        counts.update(index // 10 for index in indices)
    assert counts == {0: 100, 1: 20, 2: 20}
