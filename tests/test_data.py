"""data.py on small files in the real formats, good and broken.

`python test_data.py` measures how long a file of 400,000 lines takes to start with, and the memory it needs.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import (
    BadSample,
    Sample,
    answer_boxes,
    chat_messages,
    check_samples,
    load_image,
    move_answer_boxes,
    read_samples,
    step_indices,
    template_text,
)


@pytest.fixture
def root(tmp_path):
    for name, size in (("a.png", (40, 30)), ("b.jpg", (20, 60))):
        Image.new("RGB", size, (200, 10, 10)).save(tmp_path / name)
    return tmp_path


def write(root, *records, name="train.jsonl"):
    path = root / name
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def record(answer="[1, 2, 30, 20]", question="<image>the red thing", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": 7, "image": "a.png", "conversations": turns, **more}


# ---- what is read --------------------------------------------------------------------------------------------------


def test_training_jsonl_of_vlm_r1_is_read(root):
    [sample] = read_samples(write(root, record("<answer> [1, 2, 30, 20] </answer>")), root)
    assert sample == Sample("7", "<image>the red thing", "[1, 2, 30, 20]", (str(root / "a.png"),), "", True,
                            f"{root}/train.jsonl:1", os.path.realpath(root))  # fmt: skip


def test_evaluation_json_of_vlm_r1_is_read(root):
    path = root / "eval.json"
    path.write_text(json.dumps([{"image": "a.png", "problem": "the red thing", "solution": [1, 2, 30, 20.5]}]))
    [sample] = read_samples(path, root)
    assert (sample.question, sample.answer, sample.has_boxes) == ("the red thing", "[1, 2, 30, 20.5]", True)


def test_several_images_none_and_a_method_of_its_own_are_read(root):
    many = record("No Defect", "<image> then <image>?", image=["a.png", "b.jpg"], accu_reward_method="all_match")
    text = {"conversations": [{"value": "1 + 1?"}, {"value": 2}]}
    first, second = read_samples(write(root, many, "", text), root)
    assert len(first.images) == 2 and first.reward == "all_match" and not first.has_boxes
    assert second.images == () and second.answer == "2" and second.source.endswith(":3")


def test_the_original_name_of_a_method_becomes_ours(root):
    answer = '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]\n```'
    [sample] = read_samples(write(root, record(answer, accu_reward_method="odLength")), root)
    assert sample.reward == "od_length" and sample.has_boxes


def test_a_byte_order_mark_and_windows_line_ends_are_no_error(root):
    path = root / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(record()).encode() + b"\r\n\r\n")
    assert len(read_samples(path, root)) == 1


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{broken", "not JSON"),
        ("[1, 2]", "an object is expected"),
        ({"image": "a.png"}, "neither"),
        (record(question=" "), "question"),
        (record(question=["x"]), "question"),
        (record(image=3), '"image" is 3'),
        (record(image=[""]), '"image"'),
        (record(question="<image> and <image>"), "2 <image> marks for 1 images"),
        (record("[30, 2, 1, 20]"), "swapped"),
        (record("[1, 20, 30, 2]"), "swapped"),
        (record("[1, 2, 1, 20]"), "no area"),
        (record("[1, 2, NaN, 20]"), "swapped corners or no area"),
        (record('[{"bbox_2d": [5, 5, 1, 1], "label": "cat"}]'), "swapped"),
        (record(accu_reward_method="llm"), "accu_reward_method"),
        ({"conversations": [{"value": "only one"}]}, "conversations"),
        ({"conversations": [{"value": "q"}, {"value": "a"}, {"value": "q"}]}, "3 turns"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_reason(root, line, reason):
    path = write(root, record(), line)
    with pytest.raises(ValueError, match="train.jsonl:2: ") as error:
        read_samples(path, root)
    assert reason in str(error.value)


def test_missing_and_empty_files_and_directories_are_refused(root):
    with pytest.raises(ValueError, match="no such data file"):
        read_samples(root / "none.jsonl", root)
    with pytest.raises(ValueError, match="image_root"):
        read_samples(write(root, record()), root / "nowhere")
    with pytest.raises(ValueError, match="holds no sample"):
        read_samples(write(root, ""), root)
    (root / "latin.jsonl").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ValueError, match="not UTF-8 at byte 7"):
        read_samples(root / "latin.jsonl", root)


@pytest.mark.parametrize("change", [{"image": "gone.png"}, {"image": "broken.png"}, {"image": "b.jpg"}])
def test_missing_images_broken_headers_and_boxes_outside_are_refused_before_training(root, change):
    (root / "broken.png").write_bytes(b"not a picture")
    samples = read_samples(write(root, record(), record(**change)), root)  # b.jpg is only 20 pixels wide
    with pytest.raises(ValueError, match="train.jsonl:2: "):
        check_samples(samples)


def test_a_box_without_an_image_is_refused_before_training(root):
    samples = read_samples(write(root, {"conversations": [{"value": "q"}, {"value": "[1, 2, 3, 4]"}]}), root)
    with pytest.raises(ValueError, match="train.jsonl:1: a box without an image"):
        check_samples(samples)


def test_a_box_in_a_sideways_photo_is_measured_as_a_viewer_shows_it(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(root / "turned.jpg", exif=exif)
    assert load_image(str(root / "turned.jpg")).size == (30, 40)
    check_samples(read_samples(write(root, record("[1, 1, 29, 39]", image="turned.jpg")), root))


def test_only_a_share_of_very_many_headers_is_read(root, monkeypatch):
    opened, real_size = [], data._header_size
    monkeypatch.setattr(data, "MAX_HEADERS", 1)
    monkeypatch.setattr(data, "_header_size", lambda path: opened.append(path) or real_size(path))
    samples = read_samples(write(root, record(), record(image="b.jpg")), root)
    check_samples(samples)  # the second would be refused; it is set aside when it is drawn
    assert opened == [str(root / "a.png")]


def test_an_image_that_breaks_while_decoding_is_a_bad_sample(root):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "whole.png")
    whole = (root / "whole.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    check_samples(read_samples(write(root, record("[1, 1, 5, 5]", image="cut.png")), root))  # its header is fine
    with pytest.raises(BadSample, match="cut.png"):
        load_image(str(root / "cut.png"))


# ---- load ----------------------------------------------------------------------------------------------------------

LOAD = """
import resource, sys, time
import data
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
samples = data.read_samples(sys.argv[1] + "/train.jsonl", sys.argv[1])
data.check_samples(samples)
seconds = time.perf_counter() - start
print(len(samples), seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""


def load(lines, images):
    """(seconds, MB of growth) of a fresh process that reads and checks so many lines about so many images."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "train2014").mkdir()
        for number in range(images):
            name = root / f"train2014/COCO_train2014_{number:012d}.jpg"
            if number % 50_000 == 0:  # a file system allows some 65,000 links to a file
                Image.new("RGB", (64, 48)).save(name)
                first = name
            else:
                os.link(first, name)
        with open(root / "train.jsonl", "w") as file:
            for number in range(lines):
                question = "<image>Please provide the bounding box coordinate of the region this sentence describes: "
                image = f"train2014/COCO_train2014_{number * 7919 % images:012d}.jpg"
                box = str([number % 20, number % 17, 30 + number % 20, 30 + number % 15])
                one = record(box, f"{question}person number {number} on the left.", id=number, image=image)
                file.write(json.dumps(one) + "\n")
        command, here = [sys.executable, "-c", LOAD, directory], Path(__file__).parent.parent
        found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=here)
        count, seconds, growth = found.stdout.split()
        assert int(count) == lines
        return float(seconds), float(growth)


def test_a_large_file_needs_little_time_and_memory_a_line():
    seconds, growth = load(40_000, 4_000)  # a tenth of what `python test_data.py` measures
    assert growth < 40 and seconds < 10  # seconds of a machine shared with anything


def test_no_image_is_asked_about_by_itself_and_few_are_opened(root, monkeypatch):
    (root / "many").mkdir()
    for number in range(300):
        os.link(root / "a.png", root / f"many/{number}.png")
    path = write(root, *[record("[1, 2, 30, 20]", image=f"many/{number % 300}.png") for number in range(900)])
    samples, asked, opened = read_samples(path, root), [], []
    monkeypatch.setattr(data, "MAX_HEADERS", 100)
    real_open, real_path = Image.open, os.path.realpath
    monkeypatch.setattr(Image, "open", lambda path, **named: opened.append(path) or real_open(path, **named))
    monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(path))
    monkeypatch.setattr(os.path, "realpath", lambda path: asked.append(path) or real_path(path))
    check_samples(samples)
    assert len(opened) == 100 and asked == [str(root / "many")]
    assert len({id(sample.images) for sample in samples}) == 300  # one path for all that ask about an image


# ---- boxes in answers ----------------------------------------------------------------------------------------------


def test_boxes_are_found_bare_fenced_and_in_lists_and_nowhere_else():
    assert answer_boxes("[1, 2, 3, 4.5]") == [[1, 2, 3, 4.5]]
    assert answer_boxes("[1, 2, 3, 4]", bare=False) is None
    assert answer_boxes('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]\n```') == [[1, 2, 3, 4]]
    assert answer_boxes('{"bbox_2d": [1, 2, 3, 4]}') == [[1, 2, 3, 4]]
    for text in ("None", "[]", "[1, 2, 3]", '["a", "b", "c", "d"]', "[true, 1, 2, 3]", "4", "", "[" * 5000):
        assert answer_boxes(text) is None


def test_moving_boxes_keeps_labels_fence_and_form():
    double = lambda box: [2 * side for side in box]  # noqa: E731
    assert move_answer_boxes("[1, 2, 3, 4]", double) == "[2, 4, 6, 8]"
    fenced = move_answer_boxes('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]\n```', double)
    assert fenced == '```json\n[{"bbox_2d": [2, 4, 6, 8], "label": "a"}]\n```'


# ---- prompts and order ---------------------------------------------------------------------------------------------


def sample(question, images=1):
    return Sample("s", question, "a", ("x.png",) * images, "", False, "here")


def content(question, images=1, template="{question}!"):
    [message] = chat_messages(sample(question, images), template)
    assert message["role"] == "user"
    return [part["type"] if part["type"] == "image" else part["text"] for part in message["content"]]


def test_images_come_first_unless_the_question_places_them():
    assert content("find it") == ["image", "find it!"]
    assert content("<image>\nfind it", template="Look. {question}") == ["image", "Look. find it"]
    assert content("from <image> to <image>", 2) == ["from ", "image", " to ", "image", "!"]
    assert content("<image><image>same?", 2) == ["image", "image", "same?!"]
    assert content("no picture", 0) == ["no picture!"]


def test_braces_in_a_question_are_text():
    assert content("what is {question} or {x}?", 0) == ["what is {question} or {x}?!"]


def test_a_template_is_a_name_or_a_text_with_its_place():
    assert template_text("plain") == "{question}" and template_text("Q: {question}") == "Q: {question}"
    assert template_text("rec").endswith("Output the final answer in JSON format.")
    with pytest.raises(ValueError, match="'wreck' is unknown"):
        template_text("wreck")


def test_an_epoch_visits_every_sample_once_and_the_next_in_another_order():
    steps = [step_indices(10, 4, step, seed=3) for step in range(5)]
    flat = np.concatenate(steps)
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10].tolist() != flat[10:].tolist()


def test_the_order_is_a_function_of_seed_and_step():
    assert step_indices(100, 8, 3, seed=1) == step_indices(100, 8, 3, seed=1)
    assert step_indices(100, 8, 3, seed=1) != step_indices(100, 8, 3, seed=2)
    assert len(step_indices(3, 8, 0, seed=0)) == 8  # more prompts a step than samples


if __name__ == "__main__":
    for images in (20_000, 400_000):
        seconds, growth = load(400_000, images)
        print(f"400,000 lines about {images:,} images: {seconds:.1f} s, {growth:.0f} MB")
