"""tools/ask.py: one question about one image, several samples, a list of questions."""

import json
import shutil
from types import SimpleNamespace

import pytest
from helpers import ALONE
from PIL import Image

from data import Sample, read_samples
from infra.evaluation import Protocol, answer_samples
from model.vlm import Prompt, load_model
from tools.ask import describe, draw, gallery, main, read_answers, read_questions


@pytest.fixture
def run_checkpoint(checkpoint, tmp_path):
    """A checkpoint of a run that was evaluated under the plain template, small images and 7 tokens."""
    path = tmp_path / "best"
    shutil.copytree(checkpoint, path)
    saved = {"template": "plain", "max_completion_tokens": 7, "max_pixels": 4096, "min_pixels": 256, "box_space": ""}
    saved |= {"seed": 3, "files": {"train": {"template": "plain", "measure": "iou"}}}
    (path / "evaluation.json").write_text(json.dumps(saved))
    return str(path)


def answers_of(path, texts, *, image_size=(200, 100), input_size=(400, 400), question="the cat"):
    """What the toy's family says with these texts, as `ask` reads it."""
    sample = Sample("ask", question, "", (str(path),), "", False, "here")
    prompt = Prompt({}, "", sample, image_size, input_size)
    processor = SimpleNamespace(tokenizer=SimpleNamespace(batch_decode=lambda ids, **options: list(texts)))
    model = SimpleNamespace(config=SimpleNamespace(model_type="qwen2_5_vl"))
    return read_answers(model, processor, prompt, [], "")


def test_a_checkpoint_answers_as_in_the_evaluation_of_its_run(run_checkpoint, scenes, tmp_path, capsys):
    model, processor = load_model(run_checkpoint, max_pixels=4096, min_pixels=256)
    [sample, *_] = read_samples(scenes / "test.jsonl", scenes)
    [row] = answer_samples(model, processor, [sample], ALONE, Protocol("plain", "iou", 7, 1))
    out = tmp_path / "answer.png"
    question = sample.question.replace("<image>", "")
    assert main([run_checkpoint, sample.images[0], question, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(row["completion"] + "\n") and printed.endswith(f"{out}\n")
    assert Image.open(out).size == (512, 512)


def test_several_samples_are_drawn_with_the_seed_of_the_run(run_checkpoint, scenes, tmp_path, capsys):
    image = str(next(scenes.rglob("*.png")))
    printed = []
    for name in ("a.png", "b.png"):
        assert main([run_checkpoint, image, "the red circle", "--samples", "3", "--output", str(tmp_path / name)]) == 0
        printed.append(capsys.readouterr().out.splitlines()[:-1])
    assert printed[0] == printed[1] and len([line for line in printed[0] if line.startswith("  ")]) == 3


def test_boxes_are_told_in_pixels_of_the_original_image(tmp_path):
    found = answers_of(tmp_path, ["<answer>[40, 80, 120, 200]</answer>", "nothing"])
    assert [describe(marks) for marks in found.marks] == ["[20.0, 20.0, 60.0, 50.0]", "no box"]
    listed = '[{"bbox_2d": [0, 0, 40, 40], "label": "cat"}, {"bbox_2d": [40, 40, 80, 80], "label": "dog"}]'
    [marks] = answers_of(tmp_path, [listed]).marks
    assert describe(marks) == "[0.0, 0.0, 20.0, 10.0] cat, [20.0, 10.0, 40.0, 20.0] dog"


def test_the_picture_is_enlarged_and_each_box_has_its_colour(tmp_path):
    Image.new("RGB", (100, 50), "white").save(tmp_path / "a.png")
    texts = ["<answer>[20, 10, 60, 40]</answer>", "<answer>[70, 10, 90, 40]</answer>"]
    found = answers_of(tmp_path / "a.png", texts, image_size=(100, 50), input_size=(100, 50))
    picture = draw(found)
    assert picture.size == (500, 250)
    assert picture.getpixel((300, 100)) == (0xE6, 0x19, 0x4B) and picture.getpixel((450, 100)) == (0x2F, 0x7F, 0xFF)
    assert picture.getpixel((200, 100)) == (255, 255, 255)


def test_a_gallery_shows_every_question_and_escapes_it(tmp_path):
    Image.new("RGB", (200, 100), "white").save(tmp_path / "a.png")
    found = answers_of(tmp_path / "a.png", ["<script>alert(1)</script> [40, 80, 120, 200]"], question="<b>the cat")
    text = gallery([found, found], "m")
    assert text.count("<article") == 2 and text.count("data:image/jpeg") == 2 and text.count('class="predicted"') == 2
    assert "<script>alert" not in text and "&lt;b&gt;the cat" in text and "[20.0, 20.0, 60.0, 50.0]" in text


def test_a_list_of_questions_becomes_a_gallery(run_checkpoint, scenes, tmp_path, capsys):
    image = next(scenes.rglob("*.png"))
    Image.open(image).save(tmp_path / "here.png")
    rows = [{"image": "here.png", "question": "the red circle"}, {"image": str(image), "question": "the blue one"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    out = tmp_path / "gallery.html"
    assert main([run_checkpoint, str(tmp_path / "list.jsonl"), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "'the red circle'" in printed and "'the blue one'" in printed and out.read_text().count("<article") == 2


@pytest.mark.parametrize("line", ["no json", "[]", '{"image": "a.png"}', '{"question": "the cat"}'])
def test_a_line_that_asks_nothing_is_refused(tmp_path, line):
    (tmp_path / "list.jsonl").write_text(f'{{"image": "a.png", "question": "q"}}\n{line}\n')
    with pytest.raises(ValueError, match=r'list.jsonl:2: .*; write a line such as {"image"'):
        read_questions(tmp_path / "list.jsonl")


def test_mistakes_on_the_command_line_end_with_one_line(checkpoint, scenes, tmp_path, capsys):
    image = str(next(scenes.rglob("*.png")))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for argv, message in (
        ([checkpoint, "gone.png", "the cat"], "gone.png: no such file"),
        ([checkpoint, image], "one question in quotes"),
        ([checkpoint, str(tmp_path / "empty.jsonl"), "the cat"], "one question in quotes"),
        ([checkpoint, str(tmp_path / "empty.jsonl")], "holds no question"),
        ([checkpoint, str(tmp_path / "broken.png"), "the cat"], "does not decode"),
        ([checkpoint, image, "the cat", "--samples", "0"], "samples 0"),
        ([checkpoint, image, "the cat", "--template", "no question"], "template 'no question' is unknown"),
        ([str(tmp_path / "gone"), image, "the cat"], "gone"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error, argv
