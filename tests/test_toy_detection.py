"""toy/detection/: its data files are complete, an easy question never asks for what is absent, its start scores so."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ALONE

import toy
import toy.scenes
from data import Sample, check_samples, read_samples
from infra.config import SftConfig, TrainConfig
from infra.evaluation import Protocol, answer_samples
from infra.options import parse_options
from metrics.detection import greedy_precision_recall
from model.vlm import build_prompt, load_model
from rewards import REWARDS, parse_boxes
from toy.model import build_tokenizer, with_detection_tokens
from toy.scenes import CLASSES, ClassRecipe, Shape, draw_scene, eager_items, true_items, write_detection_split

HERE = Path(__file__).parent.parent
DOCS = (HERE / "docs" / "toy.md").read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The three files of a detection run, as `toy.ensure_data` writes them, and where they lie."""
    directory = tmp_path_factory.mktemp("detection")
    toy.scenes.write_detection_data(directory)
    return directory


def classes_of(sample: Sample) -> list[str]:
    """The classes that a question asks for."""
    return sample.question.removeprefix("<image>all of: ").removesuffix(toy.AT_ONCE).split(", ")


def items_of(text: str) -> list[dict]:
    """The items of an answer."""
    return [] if text == "None" else json.loads(text.removeprefix("```json\n").removesuffix("\n```"))


# ---- data ----------------------------------------------------------------------------------------------------------


def test_an_answer_holds_all_objects_of_the_classes_or_is_none(data):
    samples = read_samples(data / "detection_test.jsonl", data)
    check_samples(samples)
    rng = np.random.default_rng(7)  # the scenes again, from the seed of the file
    assert len(samples) == 256
    for sample in samples:
        found, asked = items_of(sample.answer), classes_of(sample)
        labels = [item["label"] for item in found]
        assert set(labels) < set(asked) <= set(CLASSES)  # at least one class asked for is absent
        assert len(set(asked)) == len(asked) <= 4 and labels == sorted(labels, key=asked.index)
        for reward in ("od_length", "od_ap", "od_f1"):
            assert REWARDS[reward](f"<answer>{sample.answer}</answer>", sample.answer) == 1.0
    first = draw_scene(rng, fewest=1, most=3)
    assert items_of(samples[0].answer) == true_items(first, classes_of(samples[0]))
    assert 0.1 < sum(sample.answer == "None" for sample in samples) / 256 < 0.3


def test_the_easy_file_has_as_many_questions_and_never_asks_for_an_absent_class(data):
    hard, easy = (read_samples(data / f"detection_{name}.jsonl", data) for name in ("train", "easy"))
    check_samples(easy)
    assert len(hard) == len(easy) == 2000
    for sample in easy:
        [asked] = classes_of(sample)
        assert {item["label"] for item in items_of(sample.answer)} == {asked}
    absent = [set(classes_of(sample)) - {item["label"] for item in items_of(sample.answer)} for sample in hard]
    assert {len(classes) for classes in absent} == {1, 2}


def test_no_record_names_a_reward_so_that_the_option_decides(data):
    assert {sample.reward for sample in read_samples(data / "detection_train.jsonl", data)} == {""}


def test_the_same_seed_writes_the_same_files(tmp_path):
    recipe = ClassRecipe(questions=2, eager=True, thoughts=True)
    for name in ("a", "b"):
        write_detection_split(tmp_path / name, "eager", 5, seed=9, recipe=recipe)
    first, second = ((tmp_path / name / "eager.jsonl").read_text() for name in ("a", "b"))
    assert first == second and len(first.splitlines()) == 10


def test_true_items_come_class_by_class_as_asked():
    a, b, c = (Shape("red", shape, "small", (x, 5, x + 10, 15)) for shape, x in zip("cdc", (1, 20, 40), strict=True))
    boxes = [item["bbox_2d"] for item in true_items([a, b, c], ["red d", "green e", "red c"])]
    assert boxes == [list(b.box), list(a.box), list(c.box)]


def test_an_eager_annotator_boxes_six_absent_classes_in_ten_at_the_shape_most_like_them():
    shapes = [
        Shape("red", "square", "small", (1, 1, 11, 11)),
        Shape("green", "circle", "small", (20, 1, 31, 11)),
        Shape("blue", "square", "small", (40, 1, 52, 11)),
    ]
    rng, absent, present = np.random.default_rng(0), [], []
    for _ in range(4000):
        items = eager_items(rng, shapes, ["green triangle", "red square"])
        absent.append([item["bbox_2d"] for item in items if item["label"] == "green triangle"])
        present.append([item["bbox_2d"] for item in items if item["label"] == "red square"])
    assert np.mean([len(boxes) for boxes in absent]) == pytest.approx(0.6, abs=0.03)
    assert all(boxes in ([], [[20, 1, 31, 11]]) for boxes in absent)
    assert np.mean([len(boxes) for boxes in present]) == pytest.approx(1.15, abs=0.02)
    assert all(boxes[0] == [1, 1, 11, 11] for boxes in present)  # AP takes the first box for the surest
    assert {tuple(boxes[1]) for boxes in present if len(boxes) == 2} == {(40, 1, 52, 11)}  # a square as well


def test_thoughts_are_empty_or_name_what_is_asked_or_what_is_listed(tmp_path):
    recipe = ClassRecipe(thoughts=True, eager=True)
    samples = read_samples(write_detection_split(tmp_path, "eager", 400, seed=3, recipe=recipe), tmp_path)
    kinds = []
    for sample in samples:
        asked, listed = classes_of(sample), list(dict.fromkeys(item["label"] for item in items_of(sample.answer)))
        thought = sample.extra["thought"]
        assert sample.question.endswith(toy.AT_ONCE) == (thought == "")
        if thought and asked != listed:
            named = [] if thought == "None" else thought.split(", ")
            assert named in (asked, listed)
            kinds.append(named == listed)
    assert np.mean(kinds) == pytest.approx(0.5, abs=0.1)
    assert np.mean([sample.extra["thought"] == "" for sample in samples]) == pytest.approx(0.25, abs=0.07)


def test_detection_data_is_written_only_if_a_file_of_it_is_wanted_and_missing(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(toy, "FILES", {"train": tmp_path / "train.jsonl"})
    monkeypatch.setattr(toy, "DETECTION_FILES", {"easy": tmp_path / "easy.jsonl"})
    monkeypatch.setattr(toy.scenes, "write_data", lambda: written.append("toy"))
    monkeypatch.setattr(toy.scenes, "write_detection_data", lambda: written.append("detection"))
    toy.ensure_data(["mine.jsonl", str(tmp_path / "train.jsonl")])
    toy.ensure_data([str(tmp_path / "easy.jsonl")])
    (tmp_path / "easy.jsonl").touch()
    toy.ensure_data([str(tmp_path / "easy.jsonl")])
    assert written == ["toy", "detection"]


def test_the_files_are_those_that_the_toy_names(data):
    assert {path.name for path in toy.DETECTION_FILES.values()} == {path.name for path in data.glob("*.jsonl")}
    assert set(toy.DETECTION_FILES) == {"train", "easy", "test"}


# ---- the start -----------------------------------------------------------------------------------------------------


def test_the_options_of_a_detection_run_are_valid():
    config = parse_options(TrainConfig, [], preset=toy.DETECTION_OPTIONS)
    assert (config.model, config.data) == (str(toy.DETECTION), str(toy.DETECTION_FILES["train"]))
    assert config.rewards == ["od_length", "format"] and config.eval_data == [str(toy.DETECTION_FILES["test"])]


def test_the_tokenizer_keeps_the_numbers_of_the_toys_tokens_and_takes_an_item_as_14():
    small, large = build_tokenizer().get_vocab(), build_tokenizer(detection=True).get_vocab()
    assert small.items() < large.items()
    tokenizer = build_tokenizer(detection=True)
    item = '{"label": "red circle", "bbox_2d": [1, 2, 33, 64]}'
    text = f"<think>None</think><answer>```json\n[{item}]\n```</answer>"
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer(item)["input_ids"]) == 14 and len(ids) == 21 and tokenizer.decode(ids) == text
    shipped = json.loads((toy.DETECTION / "tokenizer.json").read_text())
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == shipped


def test_new_tokens_begin_as_copies_and_change_no_answer_of_grounding(data):
    model, processor = load_model(str(toy.MODEL), min_pixels=toy.MIN_PIXELS, max_pixels=toy.MAX_PIXELS)
    [sample] = read_samples(data / "detection_easy.jsonl", data)[:1]
    inputs = build_prompt(processor, replace(sample, question="<image>the red circle"), template="plain").inputs
    tokenizer = build_tokenizer(detection=True)
    with torch.no_grad():
        before = model(**inputs).logits
        after = with_detection_tokens(model, tokenizer)(**inputs).logits
    used = processor.tokenizer("the red circle")["input_ids"]
    torch.testing.assert_close(after[..., used], before[..., used])
    weight = model.get_input_embeddings().weight
    for new, old in (("None", "the"), ('", ', "</think>"), (": [", '{"bbox_2d": ['), ("red", " red")):
        assert torch.equal(*weight[tokenizer.convert_tokens_to_ids([new, old])]), new


def test_the_commands_in_the_docs_are_valid():
    [block] = [text for text in re.findall(r"```bash\n(.*?)```", DOCS, re.S) if "toy detect" in text]
    script = f"python() {{ printf '%s\\t' \"$@\"; echo; }}\n{block}"  # prints the arguments as the shell cuts them
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    tight, prepare, *trained, ship = (line.strip("\t").split("\t") for line in shown.splitlines())
    run = parse_options(TrainConfig, tight[1:], preset=toy.PRESETS["train"])
    assert prepare == ["-m", "toy", "detect", "detect_data", f"{run.output_dir}/checkpoints/step-{run.steps:06d}"]
    # The models do not exist here, so the toy's own stands where they would.
    options = [parse_options(SftConfig, [*argv[1:], "--model", str(toy.MODEL)]) for argv in trained]
    made = [f"{config.output_dir}/checkpoints/step-{config.steps:06d}" for config in options]
    models = [argv[argv.index("--model") + 1] for argv in trained]
    assert models == ["detect_data/grounding", *made[:-1]] and ship == ["-m", "toy", "ship", made[-1], "detection"]
    for config in options:
        assert config.response == "<think>{thought}</think><answer>{answer}</answer>"
        assert (config.min_pixels, config.max_pixels) == (toy.MIN_PIXELS, toy.MAX_PIXELS)


def test_the_shipped_start_is_small_and_scores_what_the_docs_say(data):
    assert sum(path.stat().st_size for path in toy.DETECTION.iterdir()) < 4e6
    assert json.loads((toy.DETECTION / "config.json").read_text())["dtype"] == "bfloat16"
    options = toy.DETECTION_OPTIONS
    model, processor = load_model(str(toy.DETECTION), min_pixels=toy.MIN_PIXELS, max_pixels=toy.MAX_PIXELS)
    samples = read_samples(data / "detection_test.jsonl", data)
    protocol = Protocol("plain", "od_length", options["max_completion_tokens"], options["eval_batch_size"])
    rows = answer_samples(model, processor, samples, ALONE, protocol)
    assert np.mean([REWARDS["format"](row["completion"], "") for row in rows]) > 0.95
    images = [(parse_boxes(row["completion"]) or [], parse_boxes(row["answer"])) for row in rows]
    figures = greedy_precision_recall(images)
    figures["od_length"] = np.mean([row["reward"] for row in rows])
    stated = " ".join(DOCS.split())
    for name in ("precision", "recall", "od_length"):
        [figure] = re.findall(rf"`{name}` (0\.\d+)", stated)
        assert figures[name] == pytest.approx(float(figure), abs=0.006), name


def test_a_question_at_once_gets_an_empty_thought(data):
    model, processor = load_model(str(toy.DETECTION), min_pixels=toy.MIN_PIXELS, max_pixels=toy.MAX_PIXELS)
    samples = read_samples(data / "detection_test.jsonl", data)[:16]
    for template, is_empty in (("plain", False), (toy.AT_ONCE_TEMPLATE, True)):
        rows = answer_samples(model, processor, samples, ALONE, Protocol(template, "od_length", 100, 16))
        starts = [row["completion"].startswith("<think></think>") for row in rows]
        assert np.mean(starts) == pytest.approx(float(is_empty), abs=0.1)
