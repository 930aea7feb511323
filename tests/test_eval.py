"""eval.py: figures by hand, the reward's own parser, and a whole evaluation from the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import ALONE

import eval as evaluation
import toy
import toy.scenes
from data import read_samples
from eval import Config, bootstrap_interval, compare, greedy_rows, main, score, summarize
from infra.options import parse_options
from infra.parallel import World
from model.vlm import load_model
from rewards import first_box, iou


def row(overlap, box=(1, 2, 3, 4), truncated=False):
    return {"iou": overlap, "box": box and list(box), "truncated": truncated}


def test_the_figures_of_rec_are_shares_of_the_overlaps():
    rows = [row(0.0, None, True), row(0.5), row(0.51), row(0.9), {"bad_sample": "gone"}]
    summary = summarize(rows)
    assert (summary["samples"], summary["bad_samples"]) == (4, 1)
    assert summary["accuracy"] == 0.5  # above 0.5, not at it, as VLM-R1 counts
    assert summary["accuracy_75"] == summary["unparsed"] == summary["truncated"] == 0.25
    assert summary["mean_iou"] == pytest.approx(1.91 / 4)


def test_the_figures_of_a_text_task_are_the_mean_reward():
    summary = summarize([{"reward": value, "truncated": False} for value in (0.0, 1.0, 0.5)])
    assert summary["reward"] == 0.5 and summary["reward_low"] <= 0.5 <= summary["reward_high"]


def test_box_and_text_samples_of_one_set_are_both_reported():
    summary = summarize([row(0.6), {"reward": 0.0, "truncated": True}])
    assert summary["accuracy"] == 1 and summary["reward"] == 0 and summary["truncated"] == 0.5


@pytest.mark.parametrize(
    "answer",
    ['{"bbox_2d": [0, 0, 10, 10]}', '[{"bbox_2d": [0, 0, 10, 10]}]', '```json\n[{"bbox_2d": [0, 0, 10, 10]}]\n```'],
)
def test_every_form_of_one_true_box_is_evaluated(checkpoint, scenes, monkeypatch, answer):
    model, processor = load_model(checkpoint, min_pixels=256)
    sample = replace(read_samples(scenes / "test.jsonl", scenes)[0], answer=answer)
    monkeypatch.setattr(processor.tokenizer, "decode", lambda *arguments, **options: "<answer>[0, 0, 10, 5]</answer>")
    options = {"template": "plain", "max_completion_tokens": 2, "batch_size": 4}
    [found] = greedy_rows(model, processor, [sample], ALONE, **options)
    assert found["iou"] == pytest.approx(0.5)


def test_no_readable_sample_is_an_error_that_names_the_first():
    with pytest.raises(ValueError, match="gone"):
        summarize([{"bad_sample": "gone"}])


def test_the_interval_has_the_width_of_a_binomial_share():
    # 95% of a share of 0.5 over 400 samples: +- 1.96 * 0.025
    low, high = bootstrap_interval(np.arange(400) % 2 == 0)
    assert low == pytest.approx(0.451, abs=0.01) and high == pytest.approx(0.549, abs=0.01)


def test_answers_are_scored_by_the_rewards_parser_and_boxes_move_back(checkpoint, scenes, monkeypatch):
    model, processor = load_model(checkpoint, min_pixels=256)
    samples = read_samples(scenes / "test.jsonl", scenes)
    text = '<answer>{"bbox_2d": [2, 4, 30.5, 40]} and [0, 0, 1, 1]</answer>'
    monkeypatch.setattr(processor.tokenizer, "decode", lambda *arguments, **options: text)
    rows = greedy_rows(model, processor, samples, ALONE, template="plain", max_completion_tokens=2, batch_size=4)
    assert [r["index"] for r in rows] == list(range(6))
    assert first_box(text) == [2, 4, 30.5, 40]
    for r, sample in zip(rows, samples, strict=True):
        assert r["box"] == [2, 4, 30.5, 40]  # scenes are not resized, so both spaces are one
        assert r["iou"] == iou([2, 4, 30.5, 40], json.loads(sample.answer))


def test_an_overridden_box_space_is_moved_out_of_again(checkpoint, scenes, tmp_path, monkeypatch):
    argv = ["--model", checkpoint, "--data", str(scenes / "test.jsonl"), "--template", "plain", "--limit", "2",
            "--max_completion_tokens", "2", "--min_pixels", "256", "--box_space", "thousand",
            "--output", str(tmp_path / "e.json")]  # fmt: skip
    main(parse_options(Config, argv, {}))
    for row in json.loads((tmp_path / "e.json").read_text())["rows"]["test"]:
        there = json.loads(row["truth"])
        assert there == pytest.approx([side * 1000 / 64 for side in json.loads(row["answer"])])
        again = score(row | {"completion": f"<answer>{there}</answer>"}, "iou")
        assert again["iou"] == 1 and again["box"] == pytest.approx(json.loads(row["answer"]))


@pytest.mark.parametrize("template, found", [("base", [2, 4, 30, 40]), ("rec", None)])
def test_a_box_outside_the_tags_counts_only_under_a_prompt_that_asks_for_none(
    checkpoint, scenes, monkeypatch, template, found
):
    model, processor = load_model(checkpoint, min_pixels=256)
    sample = read_samples(scenes / "test.jsonl", scenes)[0]
    text = '```json\n[{"bbox_2d": [2, 4, 30, 40], "label": "x"}]\n```'
    monkeypatch.setattr(processor.tokenizer, "decode", lambda *arguments, **options: text)
    [r] = greedy_rows(model, processor, [sample], ALONE, template=template, max_completion_tokens=2, batch_size=4)
    assert r["box"] == found


def test_every_rank_answers_its_share_of_the_samples(checkpoint, scenes, monkeypatch):
    model, processor = load_model(checkpoint, min_pixels=256)
    samples = read_samples(scenes / "test.jsonl", scenes)
    monkeypatch.setattr(evaluation, "all_gather", lambda rows, world: rows)
    options = {"template": "plain", "max_completion_tokens": 2, "batch_size": 4}
    shares = [greedy_rows(model, processor, samples, World(rank, 2, ALONE.device, None), **options) for rank in (0, 1)]
    assert [[r["index"] for r in rows] for rows in shares] == [[0, 2, 4], [1, 3, 5]]


def test_a_whole_evaluation_writes_summary_and_rows(checkpoint, scenes, tmp_path, capsys):
    argv = ["--model", checkpoint, "--data", str(scenes / "test.jsonl"), "--template", "plain", "--limit", "4",
            "--max_completion_tokens", "3", "--min_pixels", "256", "--output", str(tmp_path / "e.json")]  # fmt: skip
    main(parse_options(Config, argv, {}))
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["summary"] == json.loads(capsys.readouterr().out) and len(written["rows"]["test"]) == 4
    assert {"id", "question", "answer", "completion", "box", "iou"} <= written["rows"]["test"][0].keys()

    main(parse_options(Config, ["--model", "none", "--predictions", str(tmp_path / "e.json")], {}))
    assert json.loads(capsys.readouterr().out) == written["summary"]


def saved(path, overlaps, **more):
    rows = [{"id": str(n), "question": "q", "iou": value, **more} for n, value in enumerate(overlaps)]
    path.write_text(json.dumps({"summary": {}, "rows": {"val": rows}}))
    return str(path)


def test_two_files_are_compared_sample_by_sample(tmp_path, capsys):
    files = [saved(tmp_path / "a.json", [0.2, 0.6, 0.4, 0.9]), saved(tmp_path / "b.json", [0.7, 0.6, 0.8, 0.8, 0.1])]
    main(parse_options(Config, ["--model", "none", "--compare", *files], {}))
    result = json.loads(capsys.readouterr().out)["val"]
    assert result["samples"] == 4 and result["accuracy"] == 0.5
    assert result["mean_iou"] == pytest.approx(0.2)
    assert result["mean_iou_low"] < 0.2 < result["mean_iou_high"]


def test_detections_are_compared_by_the_ap_of_each_image():
    box = [0, 0, 10, 10]
    truth = {"question": "q", "true": [(box, "cat")]}
    worse = [{"id": "a", "predicted": [], **truth}, {"id": "b", "question": "q", "true": [], "predicted": []}]
    better = [{"id": "a", "predicted": [(box, "cat")], **truth}, worse[1]]
    assert compare(worse, better)["image_ap"] == 0.5


def test_files_without_a_sample_in_common_are_not_compared():
    with pytest.raises(ValueError, match="no sample"):
        compare([{"id": "a", "question": "q", "iou": 1}], [{"id": "b", "question": "q", "iou": 1}])


def test_detections_are_scored_in_pixels_of_the_original_image(checkpoint, tmp_path, monkeypatch, capsys):
    data = toy.scenes.write_detection_split(tmp_path, "detect", 12, seed=1)
    samples = read_samples(data, tmp_path)
    answers = {s.question: s.answer for s in samples}
    model, processor = load_model(checkpoint, min_pixels=256)
    asked = iter(samples)
    monkeypatch.setattr(
        processor.tokenizer, "decode", lambda *a, **o: f"<answer>{answers[next(asked).question]}</answer>"
    )
    options = {"template": "plain", "max_completion_tokens": 2, "batch_size": 4, "reward": "detection"}
    rows = greedy_rows(model, processor, samples, ALONE, **options)
    summary = summarize(rows)
    assert summary["map"] == summary["map_50"] == summary["precision"] == summary["recall"] == 1.0
    assert summary["nms_ap"] == 1.0 and summary["unparsed"] == 0.0
    halved = [row | {"input_size": (32, 32)} for row in rows]  # the model saw the image at half its size
    moved = [score({**row, "truth": row["truth"]}, "detection")["true"] for row in halved]
    assert moved[0][0][0] == [2 * side for side in rows[0]["true"][0][0]]


@pytest.mark.parametrize(
    "argv, reason", [("--task guess", "guess"), ("--reward ioo --data d", "ioo"), ("", "data is empty")]
)
def test_contradictory_options_are_refused(argv, reason):
    with pytest.raises((ValueError, SystemExit), match="unknown|empty|2") as error:
        parse_options(Config, ["--model", "m", *argv.split()], {})
    assert reason in str(error.value) or isinstance(error.value, SystemExit)
