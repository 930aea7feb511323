"""eval.py: answers scored by the reward's own parser, whole evaluations, and a run's own figures to the digit."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ALONE, run_here

import eval as evaluation
import infra.evaluation
import toy
import toy.model
import toy.scenes
from data import read_samples
from infra.config import EvalConfig
from infra.evaluation import Protocol, answer_samples, score_answers
from infra.options import parse_options
from infra.parallel import World
from infra.runlog import read_rows
from metrics.summary import summarize
from model.vlm import load_model
from rewards import first_box, iou
from tools.merge import merge

HERE = Path(__file__).parent.parent
PROTOCOL = Protocol(template="plain", measure="iou", max_completion_tokens=2, batch_size=4)


def evaluate(*argv):
    """What `python eval.py` does with these options, the toy's preset aside."""
    return evaluation.main(parse_options(EvalConfig, [str(word) for word in argv]))


# ---- answers and their scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    ['{"bbox_2d": [0, 0, 10, 10]}', '[{"bbox_2d": [0, 0, 10, 10]}]', '```json\n[{"bbox_2d": [0, 0, 10, 10]}]\n```'],
)
def test_every_form_of_one_true_box_is_evaluated(checkpoint, scenes, monkeypatch, answer):
    model, processor = load_model(checkpoint, min_pixels=256)
    sample = replace(read_samples(scenes / "test.jsonl", scenes)[0], answer=answer)
    monkeypatch.setattr(processor.tokenizer, "decode", lambda *arguments, **options: "<answer>[0, 0, 10, 5]</answer>")
    [found] = answer_samples(model, processor, [sample], ALONE, PROTOCOL)
    assert found["iou"] == pytest.approx(0.5)


def test_answers_are_scored_by_the_rewards_parser_and_boxes_move_back(checkpoint, scenes, monkeypatch):
    model, processor = load_model(checkpoint, min_pixels=256)
    samples = read_samples(scenes / "test.jsonl", scenes)
    text = '<answer>{"bbox_2d": [2, 4, 30.5, 40]} and [0, 0, 1, 1]</answer>'
    monkeypatch.setattr(processor.tokenizer, "decode", lambda *arguments, **options: text)
    rows = answer_samples(model, processor, samples, ALONE, PROTOCOL)
    assert [r["index"] for r in rows] == list(range(6))
    assert first_box(text) == [2, 4, 30.5, 40]
    for r, sample in zip(rows, samples, strict=True):
        assert r["box"] == [2, 4, 30.5, 40]  # scenes are not resized, so both spaces are one
        assert r["iou"] == iou([2, 4, 30.5, 40], json.loads(sample.answer))


def test_a_thought_that_the_chat_template_has_opened_belongs_to_the_answer(checkpoint, scenes, monkeypatch):
    model, processor = load_model(checkpoint, min_pixels=256)
    [sample] = read_samples(scenes / "test.jsonl", scenes)[:1]
    monkeypatch.setattr(processor.tokenizer, "decode", lambda *arguments, **options: "a</think><answer>b</answer>")
    for ending, score in (("<think>\n", 1.0), ("", 0.0), ("<think></think>\n", 0.0)):
        monkeypatch.setattr(processor, "chat_template", toy.model.CHAT_TEMPLATE + ending)
        [row] = answer_samples(model, processor, [sample], ALONE, replace(PROTOCOL, measure="format"))
        assert row["reward"] == score, row["completion"]


def test_your_own_reward_receives_the_records_other_keys_and_again_from_saved_answers(
    checkpoint, scenes, tmp_path, monkeypatch
):
    (tmp_path / "mine.py").write_text("def known(completion, answer, sample):\n    return sample['level'] / 4\n")
    model, processor = load_model(checkpoint, min_pixels=256)
    [sample] = read_samples(scenes / "test.jsonl", scenes)[:1]
    sample = replace(sample, extra={"level": 3}, has_boxes=False)
    rows = answer_samples(model, processor, [sample], ALONE, replace(PROTOCOL, measure=f"{tmp_path / 'mine.py'}:known"))
    assert [row["reward"] for row in (*rows, *score_answers(rows))] == [0.75, 0.75]


def test_an_overridden_box_space_is_moved_out_of_again(checkpoint, scenes, tmp_path):
    evaluate("--model", checkpoint, "--data", scenes / "test.jsonl", "--template", "plain", "--limit", "2",
             "--max_completion_tokens", "2", "--min_pixels", "256", "--box_space", "thousand",
             "--output", tmp_path / "e.json")  # fmt: skip
    for row in json.loads((tmp_path / "e.json").read_text())["rows"]["test"]:
        there = json.loads(row["truth"])
        assert there == pytest.approx([side * 1000 / 64 for side in json.loads(row["answer"])])
        [again] = score_answers([row | {"completion": f"<answer>{there}</answer>"}])
        assert again["iou"] == 1 and again["box"] == pytest.approx(json.loads(row["answer"]))


@pytest.mark.parametrize("template, found", [("base", [2, 4, 30, 40]), ("rec", None)])
def test_a_box_outside_the_tags_counts_only_under_a_prompt_that_asks_for_none(
    checkpoint, scenes, monkeypatch, template, found
):
    model, processor = load_model(checkpoint, min_pixels=256)
    sample = read_samples(scenes / "test.jsonl", scenes)[0]
    text = '```json\n[{"bbox_2d": [2, 4, 30, 40], "label": "x"}]\n```'
    monkeypatch.setattr(processor.tokenizer, "decode", lambda *arguments, **options: text)
    [r] = answer_samples(model, processor, [sample], ALONE, replace(PROTOCOL, template=template))
    assert r["box"] == found


def test_every_rank_answers_its_share_of_the_samples(checkpoint, scenes, monkeypatch):
    model, processor = load_model(checkpoint, min_pixels=256)
    samples = read_samples(scenes / "test.jsonl", scenes)
    monkeypatch.setattr(infra.evaluation, "all_gather", lambda rows, world: rows)
    worlds = [World(rank, 2, ALONE.device, None) for rank in (0, 1)]
    shares = [answer_samples(model, processor, samples, world, PROTOCOL) for world in worlds]
    assert [[r["index"] for r in rows] for rows in shares] == [[0, 2, 4], [1, 3, 5]]


def test_detections_are_scored_in_pixels_of_the_original_image(checkpoint, tmp_path, monkeypatch):
    data = toy.scenes.write_detection_split(tmp_path, "detect", 12, seed=2)
    samples = read_samples(data, tmp_path)
    answers = {s.question: s.answer for s in samples}
    model, processor = load_model(checkpoint, min_pixels=256)
    asked = iter(samples)
    monkeypatch.setattr(
        processor.tokenizer, "decode", lambda *a, **o: f"<answer>{answers[next(asked).question]}</answer>"
    )
    rows = answer_samples(model, processor, samples, ALONE, replace(PROTOCOL, measure="detection"))
    summary = summarize(rows)
    assert summary["map"] == summary["map_50"] == summary["precision"] == summary["recall"] == 1.0
    assert summary["nms_ap"] == 1.0 and summary["unparsed"] == 0.0
    halved = [row | {"input_size": (32, 32)} for row in rows]  # the model saw the image at half its size
    moved = [row["true"] for row in score_answers(halved)]
    assert moved[0][0][0] == [2 * side for side in rows[0]["true"][0][0]]


# ---- whole evaluations ---------------------------------------------------------------------------------------------


def test_a_whole_evaluation_writes_summary_and_rows_and_scores_them_again_alike(checkpoint, scenes, tmp_path, capsys):
    evaluate("--model", checkpoint, "--data", scenes / "test.jsonl", "--template", "plain", "--limit", "4",
             "--max_completion_tokens", "3", "--min_pixels", "256", "--output", tmp_path / "e.json")  # fmt: skip
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["summary"] == json.loads(capsys.readouterr().out) and len(written["rows"]["test"]) == 4
    assert {"id", "question", "answer", "completion", "box", "iou"} <= written["rows"]["test"][0].keys()

    evaluate("--predictions", tmp_path / "e.json")
    again = json.loads(capsys.readouterr().out)
    assert again == written["summary"] and list(again["test"]) == list(written["summary"]["test"])


def test_saved_answers_are_scored_and_compared_by_the_first_process_alone(tmp_path, capsys, monkeypatch):
    path = saved(tmp_path / "a.json", [0.2, 0.6])
    monkeypatch.setenv("RANK", "1")
    assert evaluate("--predictions", path, "--output", tmp_path / "out.json") == 0
    assert evaluate("--compare", path, path) == 0
    assert capsys.readouterr().out == "" and not (tmp_path / "out.json").exists()


def test_detections_and_broken_samples_are_scored_again_alike(checkpoint, tmp_path, capsys):
    data = toy.scenes.write_detection_split(tmp_path, "detect", 4, seed=1)
    image = Path(read_samples(data, tmp_path)[0].images[0])
    image.write_bytes(image.read_bytes()[:200])  # its header is whole
    evaluate("--model", checkpoint, "--data", data, "--image_root", tmp_path, "--task", "detection",
             "--max_completion_tokens", "3", "--min_pixels", "256", "--output", tmp_path / "e.json")  # fmt: skip
    written = json.loads(capsys.readouterr().out)
    assert written["detect"]["bad_samples"] > 0 and "map" in written["detect"]
    evaluate("--predictions", tmp_path / "e.json")
    assert json.loads(capsys.readouterr().out) == written


def test_the_directory_of_the_output_is_looked_for_before_anything_is_answered(
    checkpoint, scenes, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation, "load_any", lambda *names, **named: pytest.fail("the model is loaded"))
    with pytest.raises(ValueError, match=r"output .*none/e.json: its directory does not exist; make it first"):
        evaluate("--model", checkpoint, "--data", scenes / "test.jsonl", "--output", tmp_path / "none" / "e.json")


# ---- a checkpoint is evaluated as its run was ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the toy, one with LoRA, on shrunk images, a tight length, half of the test set and a seed."""
    root = tmp_path_factory.mktemp("runs")
    toy.scenes.write_split(root, "train", 24, seed=1)
    toy.scenes.write_split(root, "test", 16, seed=2)
    argv = ["--model", str(toy.MODEL), "--data", str(root / "train.jsonl"), "--eval_data", str(root / "test.jsonl"),
            "--template", "find {question}", "--max_pixels", "2304", "--min_pixels", "256", "--seed", "5",
            "--max_completion_tokens", "19", "--eval_limit", "8", "--eval_every", "1", "--steps", "1",
            "--prompts_per_step", "2", "--group_size", "2", "--learning_rate", "1e-5"]  # fmt: skip
    for name, more in {"plain": [], "lora": ["--lora_rank", "4"]}.items():
        run_here([*argv, *more], root / name)
    return root


def logged(runs, name):
    """The figures of the last evaluation of a run, under their bare names."""
    figures = read_rows(runs / name / "eval.jsonl")[-1]
    assert figures.pop("step") == 1
    return {key.removeprefix("eval/test/"): value for key, value in figures.items()}


@pytest.fixture(scope="module")
def models(runs):
    """The same weights in three places: in their run, as a copy elsewhere, and merged from an adapter."""
    shutil.copytree(runs / "plain" / "checkpoints" / "step-000001", runs / "elsewhere")
    merge(str(runs / "lora" / "checkpoints" / "step-000001"), str(runs / "merged"))
    (runs / "best").symlink_to(runs / "plain" / "checkpoints" / "step-000001")  # as OUT/best
    return runs


@pytest.mark.parametrize(
    "place, run",
    [
        ("plain/checkpoints/step-000001", "plain"),
        ("best", "plain"),
        ("elsewhere", "plain"),
        ("lora/checkpoints/step-000001", "lora"),
        ("merged", "lora"),
    ],
)
def test_a_checkpoint_gives_the_figures_that_its_run_logged_wherever_it_lies(models, capsys, place, run):
    evaluate("--model", models / place, "--data", models / "test.jsonl", "--limit", "8")
    said = capsys.readouterr()
    expected = logged(models, run)
    assert expected["mean_iou"] > 0 and 0 < expected["truncated"] < 1  # or settings would make no difference
    assert json.loads(said.out) == {"test": expected}
    path = models / place / "evaluation.json"
    assert said.err.splitlines()[:3] == [
        f"evaluating {models / place} under {path}",
        "  test: template 'find {question}', iou",
        "  256 to 2,304 pixels, at most 19 tokens, 8 samples drawn with seed 5",
    ]


@pytest.mark.parametrize(
    "option, value",
    [("template", "plain"), ("max_pixels", "65536"), ("max_completion_tokens", "14"), ("seed", "6")],
)
def test_what_the_command_line_gives_replaces_what_the_run_used(models, capsys, option, value):
    argv = ["--model", models / "elsewhere", "--data", models / "test.jsonl", "--limit", "8"]
    evaluate(*argv, f"--{option}", value)
    said = capsys.readouterr()
    assert json.loads(said.out)["test"] != logged(models, "plain")
    assert {"max_pixels": "to 65,536 pixels", "seed": "seed 6"}.get(option, value) in said.err


def test_a_checkpoints_own_pixels_stand_against_the_default_alone(models, capsys):
    for argv, told in (([], "256 to 2,304 pixels"), (["--min_pixels", "1024"], "1,024 to 2,304 pixels")):
        evaluate("--model", models / "elsewhere", "--data", models / "test.jsonl", "--limit", "1", *argv)
        assert told in capsys.readouterr().err
    with pytest.raises(ValueError, match="max_pixels 2304 is below min_pixels 9999"):
        evaluate("--model", models / "elsewhere", "--data", models / "test.jsonl", "--min_pixels", "9999")


def test_a_model_of_no_run_is_evaluated_under_the_defaults_and_says_so(checkpoint, scenes, capsys):
    evaluate("--model", checkpoint, "--data", scenes / "test.jsonl", "--limit", "2", "--max_completion_tokens", "2")
    assert capsys.readouterr().err.splitlines()[:3] == [
        f"evaluating {checkpoint}",
        "  test: template 'rec', iou",
        "  3,136 to 1,003,520 pixels, at most 2 tokens, 2 samples drawn with seed 42",
    ]


def test_the_settings_go_to_stderr_so_that_stdout_is_json(models):
    argv = ["--model", str(models / "elsewhere"), "--data", str(models / "test.jsonl"), "--limit", "8"]
    done = subprocess.run([sys.executable, "eval.py", *argv], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"test": logged(models, "plain")}
    assert "under " in done.stderr and "pixels each" in done.stderr


def test_two_processes_print_the_settings_and_the_summary_of_one_once(models):
    argv = ["--model", str(models / "elsewhere"), "--data", str(models / "test.jsonl"), "--limit", "8"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "eval.py", *argv], cwd=HERE, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"test": logged(models, "plain")}
    assert done.stderr.count("evaluating ") == done.stderr.count("pixels each") == 1


@pytest.mark.parametrize("measure, reason", [("gone.py:f", "there is no file 'gone.py'"), ("ioo", "'ioo' is unknown")])
def test_a_reward_that_a_run_used_and_that_is_gone_is_told_before_anything_is_answered(
    models, tmp_path, measure, reason, monkeypatch
):
    monkeypatch.setattr(evaluation, "load_any", lambda *names, **named: pytest.fail("the model is loaded"))
    shutil.copytree(models / "elsewhere", tmp_path / "copy")
    about = json.loads((tmp_path / "copy" / "evaluation.json").read_text())
    about["files"]["test"]["measure"] = measure
    (tmp_path / "copy" / "evaluation.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=reason):
        evaluate("--model", tmp_path / "copy", "--data", models / "test.jsonl")


# ---- two evaluations compared --------------------------------------------------------------------------------------


def saved(path, overlaps, name="val", **more):
    rows = [{"id": str(n), "question": "q", "iou": value, **more} for n, value in enumerate(overlaps)]
    path.write_text(json.dumps({"summary": {}, "rows": {name: rows}}))
    return str(path)


def test_two_files_are_compared_sample_by_sample(tmp_path, capsys):
    files = [saved(tmp_path / "a.json", [0.2, 0.6, 0.4, 0.9]), saved(tmp_path / "b.json", [0.7, 0.6, 0.8, 0.8, 0.1])]
    evaluate("--compare", *files)
    result = json.loads(capsys.readouterr().out)["val"]
    assert result["samples"] == 4 and result["accuracy"] == 0.5
    assert result["mean_iou"] == pytest.approx(0.2)
    assert result["mean_iou_low"] < 0.2 < result["mean_iou_high"]


def test_files_without_a_sample_in_common_are_not_compared(tmp_path):
    files = [saved(tmp_path / "a.json", [0.2]), saved(tmp_path / "b.json", [0.2], question="another")]
    with pytest.raises(ValueError, match="no sample"):
        evaluate("--compare", *files)


def test_files_that_evaluate_other_data_are_not_compared(tmp_path):
    a, b = saved(tmp_path / "a.json", [0.2]), saved(tmp_path / "b.json", [0.2], name="test")
    with pytest.raises(ValueError) as error:
        evaluate("--compare", a, b)
    assert str(error.value) == f"{a} evaluates val and {b} test: there is no common file to compare on"


def test_a_relative_and_an_absolute_path_name_the_same_samples(models, tmp_path, capsys, monkeypatch):
    lines = [json.loads(line) for line in (models / "test.jsonl").read_text().splitlines()]
    assert not any(line.pop("id") is None for line in lines)
    (models / "noid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(models)
    for data, output in (("noid.jsonl", "a.json"), (models / "noid.jsonl", "b.json")):
        evaluate("--model", models / "elsewhere", "--data", data, "--limit", "3", "--output", tmp_path / output)
    capsys.readouterr()
    evaluate("--compare", tmp_path / "a.json", tmp_path / "b.json")
    found = json.loads(capsys.readouterr().out)["noid"]
    assert found["samples"] == 3 and found["mean_iou"] == 0
