"""toy/: questions fit one shape of their scene, the tokenizer loses nothing, the start scores what docs/toy.md says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ALONE
from PIL import Image

import toy
import toy.model
import toy.scenes
from data import check_samples, read_samples
from infra.config import EvalConfig, SftConfig, TrainConfig
from infra.evaluation import Protocol, answer_samples
from infra.options import parse_options
from model.vlm import load_model
from toy.scenes import (
    COLOURS,
    SHAPES,
    SIDE,
    Recipe,
    Shape,
    attribute_question,
    draw_scene,
    loosened,
    paint_scene,
    relation_question,
)

HERE = Path(__file__).parent.parent
DOCS = (HERE / "docs" / "toy.md").read_text()


# ---- scenes and questions ------------------------------------------------------------------------------------------


def fits(question, shape):
    """Whether the words of a question fit a shape."""
    words = question.split()[1:]
    return all(word in (shape.size, shape.colour, shape.shape) for word in words)


def test_an_attribute_question_fits_exactly_one_shape():
    rng = np.random.default_rng(0)
    for _ in range(300):
        shapes = draw_scene(rng)
        question = attribute_question(rng, shapes, shapes[0])
        if question is not None:
            assert [fits(question, shape) for shape in shapes] == [shape is shapes[0] for shape in shapes]


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
        alike = [s for s in shapes if s is not other and s.shape == target]
        assert [s for s in alike if sign * (s.centre[axis] - other.centre[axis]) > 6] == [shapes[0]]
    assert asked > 100


def test_a_box_is_exactly_as_large_as_the_painted_shape():
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


def test_only_the_first_shape_of_a_scene_with_an_unseen_pair_is_one():
    rng = np.random.default_rng(3)
    for _ in range(50):
        first, *others = draw_scene(rng, unseen_pairs=True)
        assert (first.colour, first.shape) in toy.scenes.UNSEEN_PAIRS
        assert not any((s.colour, s.shape) in toy.scenes.UNSEEN_PAIRS for s in others)


def test_a_loose_box_pushes_every_side_out_by_5_to_45_percent():
    rng, outs = np.random.default_rng(4), []
    for _ in range(2000):
        x1, y1, x2, y2 = loosened(rng, (22, 24, 42, 44))
        assert x1 < 22 and y1 < 24 and x2 > 42 and y2 > 44 and min(x1, y1) >= 13 and max(x2, y2) <= 53
        outs.append(22 - x1)
    assert np.mean(outs) == pytest.approx(0.25 * 20, abs=0.3)


def test_the_same_seed_writes_the_same_files_and_data_reads_them(tmp_path):
    for name in ("a", "b"):
        toy.scenes.write_split(tmp_path / name, "train", 5, seed=9, recipe=Recipe(relations=0.5, questions=2))
    first, second = ((tmp_path / name / "train.jsonl").read_text() for name in ("a", "b"))
    assert first == second
    samples = read_samples(tmp_path / "a" / "train.jsonl", tmp_path / "a")
    check_samples(samples)
    assert samples[0].has_boxes and Image.open(samples[0].images[0]).size == (SIDE, SIDE)


# ---- the data of the commands --------------------------------------------------------------------------------------


def test_importing_the_toy_imports_no_package():
    code = "import sys, toy; print(sorted({'numpy', 'PIL', 'torch', 'tqdm', 'transformers'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_data_is_written_only_if_a_file_of_the_toy_is_missing(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(toy, "FILES", {name: tmp_path / f"{name}.jsonl" for name in ("train", "test")})
    monkeypatch.setattr(toy.scenes, "write_data", lambda: written.append(True))
    (tmp_path / "train.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    toy.ensure_data(["", "mine.jsonl", "train.jsonl", str(tmp_path / "train.jsonl")])
    assert not written
    toy.ensure_data(["train.jsonl", "test.jsonl"])  # relative paths count too
    assert written


def test_writing_the_data_leaves_files_that_exist_alone(tmp_path, monkeypatch):
    write_split = toy.scenes.write_split
    monkeypatch.setattr(toy.scenes, "write_split", lambda d, name, n, **options: write_split(d, name, 2, **options))
    data = tmp_path / "data"
    toy.scenes.write_data(data)
    names = {"train", "test", "pairs", "relations"}
    assert {path.name for path in data.iterdir()} == names | {f"{name}.jsonl" for name in names}
    (data / "train.jsonl").write_text("mine")
    (data / "test.jsonl").unlink()
    toy.scenes.write_data(data)
    assert (data / "train.jsonl").read_text() == "mine"
    check_samples(read_samples(data / "test.jsonl", data))
    assert {path.name for path in data.iterdir()} == names | {f"{name}.jsonl" for name in names}


@pytest.mark.parametrize(("command", "config"), [("train", TrainConfig), ("sft", SftConfig), ("eval", EvalConfig)])
def test_without_options_a_command_gets_the_toy(command, config):
    options = parse_options(config, [], preset=toy.PRESETS[command])
    assert (options.model, options.image_root, options.template) == (str(toy.MODEL), str(toy.DATA), "plain")
    files = options.data if command == "eval" else [options.data, *options.eval_data]
    assert set(map(Path, files)) <= set(toy.FILES.values())


def test_the_commands_in_the_docs_are_valid():
    [block] = [text for text in re.findall(r"```bash\n(.*?)```", DOCS, re.S) if "toy start" in text]
    script = f"python() {{ printf '%s\\t' \"$@\"; echo; }}\n{block}"  # prints the arguments as the shell cuts them
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    start, *lines = (line.strip("\t").split("\t") for line in shown.splitlines())
    assert start == ["-m", "toy", "start", "start_data"]
    steps = {}
    for first, second, ship in zip(*[iter(lines)] * 3, strict=True):
        # The models do not exist here, so the toy's own stands where they would.
        options = [parse_options(SftConfig, [*argv[1:], "--model", str(toy.MODEL)]) for argv in (first, second)]
        made = [f"{config.output_dir}/checkpoints/step-{config.steps:06d}" for config in options]
        size = ship[-1]
        assert first[first.index("--model") + 1] == f"start_data/untrained/{size}"
        assert second[second.index("--model") + 1] == made[0] and ship == ["-m", "toy", "ship", made[1], size]
        for config in options:
            assert config.response == toy.RESPONSE
            assert (config.min_pixels, config.max_pixels) == (toy.MIN_PIXELS, toy.MAX_PIXELS)
        steps[size] = [config.steps for config in options]
    assert steps.keys() == toy.STARTS.keys() == toy.WIDTHS.keys() and steps["1.1M"] == [1200, 250]


# ---- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '<think>the small red circle</think><answer>{"bbox_2d": [12, 7, 30, 64]}</answer>',
        "these are 1234 Boxes, 65! <answ",
        "the circle left of the green square\n<|im_end|>",
    ],
)
def test_decoding_gives_the_encoded_text_back(text):
    tokenizer = toy.model.build_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def test_words_numbers_and_tags_are_one_token_each():
    tokenizer = toy.model.build_tokenizer()
    text = '<think>the small red circle</think><answer>{"bbox_2d": [12, 7, 30, 64]}</answer>'
    assert len(tokenizer(text)["input_ids"]) == 17


def test_a_word_or_number_counts_only_where_it_ends():
    tokenizer = toy.model.build_tokenizer()
    assert tokenizer.tokenize("these red") == ["t", "h", "e", "s", "e", " red"]
    assert tokenizer.tokenize("64, 640") == ["64", ", ", "6", "40"]


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds():
    shipped = json.loads((toy.MODEL / "tokenizer.json").read_text())
    assert json.loads(toy.model.build_tokenizer().backend_tokenizer.to_str()) == shipped


@pytest.mark.parametrize("size", toy.STARTS)
def test_a_shipped_start_has_the_parameters_and_the_score_that_the_docs_state(size, tmp_path):
    model, processor = load_model(str(toy.STARTS[size]), min_pixels=256, max_pixels=256 * 256)
    samples = read_samples(toy.scenes.write_split(tmp_path, "test", 256, seed=2), tmp_path)
    protocol = Protocol("plain", "iou", max_completion_tokens=24, batch_size=64)
    ious = np.array([row["iou"] for row in answer_samples(model, processor, samples, ALONE, protocol)])
    [row] = [line.strip("|").split("|") for line in DOCS.splitlines() if line.startswith(f"| {size} ")]
    _, parameters, width, _, accuracy, mean_iou = (cell.strip().replace(",", "") for cell in row)
    num_parameters = sum(p.numel() for p in model.parameters())
    assert (num_parameters, toy.WIDTHS[size]) == (int(parameters), int(width))
    assert f"{num_parameters / 1e6:.1f}M" == size
    assert sum(path.stat().st_size for path in toy.STARTS[size].iterdir()) < 3.6 * num_parameters
    assert np.mean(ious > 0.5) == pytest.approx(float(accuracy), abs=0.006)
    assert np.mean(ious) == pytest.approx(float(mean_iou), abs=0.006)
    assert json.loads((toy.STARTS[size] / "config.json").read_text())["dtype"] == "bfloat16"
