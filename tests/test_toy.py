"""toy.py: scenes say what their questions mean, the tokenizer loses nothing, the start scores what is stated."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import toy
import toy.model
import toy.scenes
from data import check_samples, read_samples
from rewards import REWARDS
from toy.scenes import (
    COLOURS,
    SHAPES,
    SIDE,
    Shape,
    attribute_question,
    draw_scene,
    loosened,
    paint_scene,
    relation_question,
)

HERE = Path(__file__).parent.parent


def means(question, shape):
    """Whether the words of a question fit a shape."""
    words = question.split()[1:]
    return all(word in (shape.size, shape.colour, shape.shape) for word in words)


def test_an_attribute_question_fits_exactly_one_shape():
    rng = np.random.default_rng(0)
    for _ in range(300):
        shapes = draw_scene(rng)
        question = attribute_question(rng, shapes, shapes[0])
        if question is not None:
            assert [means(question, shape) for shape in shapes] == [shape is shapes[0] for shape in shapes]


def test_a_relation_question_fits_exactly_one_shape():
    rng, asked = np.random.default_rng(0), 0
    pattern = re.compile(r"the (\w+) (left of|right of|above|below) the (\w+) (\w+)$")
    for _ in range(300):
        shapes = draw_scene(rng)
        question = relation_question(rng, shapes, shapes[0])
        if question is None:
            continue
        asked += 1
        target, relation, colour, shape = pattern.match(question).groups()
        [other] = [s for s in shapes if (s.colour, s.shape) == (colour, shape)]
        axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
        fits = [
            s
            for s in shapes
            if s is not other and s.shape == target and sign * (s.centre[axis] - other.centre[axis]) > 6
        ]
        assert fits == [shapes[0]]
    assert asked > 100


def test_boxes_hug_what_is_painted():
    for shape in SHAPES:
        for box in ((5, 6, 17, 19), (20, 30, 47, 55)):
            for colour in COLOURS:
                # The same ground and noise with and without the shape differ exactly where it is.
                bare, painted = (
                    np.asarray(paint_scene(np.random.default_rng(1), shapes)).astype(int)
                    for shapes in ([], [Shape(colour, shape, "small", box)])
                )
                ys, xs = np.nonzero((bare != painted).any(2))
                assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == box, (shape, colour)


def test_shapes_lie_inside_the_scene_and_do_not_touch():
    rng = np.random.default_rng(2)
    for _ in range(200):
        shapes = draw_scene(rng)
        assert 2 <= len(shapes) <= 4
        for number, a in enumerate(shapes):
            assert 0 < a.box[0] < a.box[2] < SIDE and 0 < a.box[1] < a.box[3] < SIDE
            assert (a.colour, a.shape) not in toy.scenes.UNSEEN_PAIRS
            for b in shapes[:number]:
                assert a.box[2] < b.box[0] or b.box[2] < a.box[0] or a.box[3] < b.box[1] or b.box[3] < a.box[1]


def test_the_split_of_unseen_pairs_asks_for_them():
    rng = np.random.default_rng(3)
    for _ in range(50):
        first, *others = draw_scene(rng, unseen_pairs=True)
        assert (first.colour, first.shape) in toy.scenes.UNSEEN_PAIRS
        assert not any((s.colour, s.shape) in toy.scenes.UNSEEN_PAIRS for s in others)


def test_loose_boxes_hold_the_true_one_and_are_at_most_45_percent_wider():
    rng, outs = np.random.default_rng(4), []
    for _ in range(2000):
        x1, y1, x2, y2 = loosened(rng, (22, 24, 42, 44))
        assert x1 < 22 and y1 < 24 and x2 > 42 and y2 > 44 and min(x1, y1) >= 13 and max(x2, y2) <= 53
        outs.append(22 - x1)
    assert np.mean(outs) == pytest.approx(0.25 * 20, abs=0.3)


def test_the_same_seed_writes_the_same_files_in_the_format_that_data_reads(tmp_path):
    for name in ("a", "b"):
        toy.scenes.write_split(tmp_path / name, "train", 5, seed=9, relations=0.5, questions=2)
    first, second = ((tmp_path / name / "train.jsonl").read_text() for name in ("a", "b"))
    assert first == second
    samples = read_samples(tmp_path / "a" / "train.jsonl", tmp_path / "a")
    check_samples(samples)
    assert samples[0].has_boxes and Image.open(samples[0].images[0]).size == (SIDE, SIDE)


def test_a_detection_question_is_answered_by_all_objects_of_its_classes_or_none(tmp_path):
    samples = read_samples(toy.scenes.write_detection_split(tmp_path, "detect", 60, seed=5), tmp_path)
    check_samples(samples)
    answers = [sample.answer for sample in samples]
    assert 3 < answers.count("None") < 30
    for sample in samples:
        asked = sample.question.removeprefix("<image>all of: ").split(", ")
        items = [] if sample.answer == "None" else json.loads(sample.answer.split("```")[1].removeprefix("json"))
        assert {item["label"] for item in items} < set(asked)  # at least one class asked for is absent
        assert sample.reward == "od_length"
        assert REWARDS["od_length"](f"<answer>{sample.answer}</answer>", sample.answer) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        '<think>the small red circle</think><answer>{"bbox_2d": [12, 7, 30, 64]}</answer>',
        "these are 1234 Boxes, 65! <answ",
        "the circle left of the green square\n<|im_end|>",
    ],
)
def test_the_tokenizer_gives_back_what_it_was_given(text):
    tokenizer = toy.model.build_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def test_words_numbers_and_tags_are_one_token_each():
    tokenizer = toy.model.build_tokenizer()
    text = '<think>the small red circle</think><answer>{"bbox_2d": [12, 7, 30, 64]}</answer>'
    assert len(tokenizer(text)["input_ids"]) == 17


def test_the_shipped_start_is_small_and_scores_what_the_readme_says(tmp_path):
    from test_parallel import ALONE

    from eval import greedy_rows, summarize
    from model.vlm import load_model

    size = sum(path.stat().st_size for path in toy.MODEL.iterdir())
    assert size < 4e6
    model, processor = load_model(str(toy.MODEL), min_pixels=256, max_pixels=256 * 256)
    assert sum(p.numel() for p in model.parameters()) == 1_104_672
    path = toy.scenes.write_split(tmp_path, "test", 256, seed=2)
    rows = greedy_rows(
        model, processor, read_samples(path, tmp_path), ALONE, template="plain", max_completion_tokens=24, batch_size=64
    )
    summary = summarize(rows)
    stated = re.search(
        r"start scores (0\.\d+) at IoU 0\.5 and a mean IoU of (0\.\d+)",
        " ".join((HERE / "README.md").read_text().split()),
    )
    assert summary["accuracy"] == pytest.approx(float(stated[1]), abs=0.006)
    assert summary["mean_iou"] == pytest.approx(float(stated[2]), abs=0.006)
    assert json.loads((toy.MODEL / "config.json").read_text())["dtype"] == "bfloat16"
