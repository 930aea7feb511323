"""data.py on small files in the real formats, good and broken.

`python -m tests.test_data` measures how long it takes to read and check a file of 400,000 lines, and the memory.
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


def write_list(root, *records, name="eval.json"):
    path = root / name
    path.write_text(json.dumps(records, indent=1))
    return path


def test_evaluation_json_of_vlm_r1_is_read(root):
    path = write_list(root, {"image": "a.png", "problem": "the red thing", "solution": [1, 2, 30, 20.5]})
    [sample] = read_samples(path, root)
    assert (sample.question, sample.answer, sample.has_boxes) == ("the red thing", "[1, 2, 30, 20.5]", True)


USER = {"role": "user", "content": "<image>Who are they?"}
ASSISTANT = {"role": "assistant", "content": "They're Kane and Gretzka from Bayern Munich."}
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
VIDEO_PARTS = [{"type": "video"}, {"type": "text", "text": "x"}]
TRL_PARTS = [{"type": "image", "text": None}, {"type": "text", "text": "Where is the cup?"}]
CHAT_LINES = {  # name: (line, question, answer, number of images)
    "LLaMA-Factory": (
        {"messages": [USER, ASSISTANT], "images": ["mllm_demo_data/1.jpg"]},
        "<image>Who are they?", "They're Kane and Gretzka from Bayern Munich.", 1),
    "LLaMA-Factory, several images": (
        {"messages": [USER | {"content": "<image><image>Which is older?"}, ASSISTANT | {"content": "The first."}],
         "images": ["mllm_demo_data/1.jpg", "mllm_demo_data/2.jpg"]},
        "<image><image>Which is older?", "The first.", 2),
    "LLaMA-Factory, text alone": (
        {"messages": [USER | {"content": "hi"}, ASSISTANT | {"content": "Hello!"}]}, "hi", "Hello!", 0),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cup."}],
         "images": ["cups/1.jpg"]}, "What is it?", "A cup.", 1),
    "TRL, parts": (
        {"images": ["a.png"], "messages": [
            {"role": "user", "content": TRL_PARTS},
            {"role": "assistant", "content": [{"type": "text", "text": '{"bbox_2d": [1, 2, 30, 20]}'}]}]},
        "<image>Where is the cup?", '{"bbox_2d": [1, 2, 30, 20]}', 1),
    "TRL, parts with an image amid the text": (
        {"image": "a.png", "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Here "}, {"type": "image"},
                                         {"type": "text", "text": " is what?"}]},
            ASSISTANT | {"content": "A cup."}]},
        "Here <image> is what?", "A cup.", 1),
    "TRL, a prompt and its solution": (
        {"prompt": [{"role": "user", "content": TRL_PARTS}], "image": "a.png", "solution": "[1, 2, 30, 20]"},
        "<image>Where is the cup?", "[1, 2, 30, 20]", 1),
    "a text as the prompt": ({"prompt": "2 + 2 = ?", "solution": "4"}, "2 + 2 = ?", "4", 0),
    "ms-swift, a message and its solution": (
        {"messages": [{"role": "user", "content": "<image>Find the cup."}], "images": ["a.png"],
         "solution": [1, 2, 30, 20]}, "<image>Find the cup.", "[1, 2, 30, 20]", 1),
    "messages whose answer is a list of boxes": (
        {"messages": [USER, ASSISTANT | {"content": [{"bbox_2d": [1, 2, 30, 20], "label": "cup"}]}], "images": "a.png"},
        "<image>Who are they?", '[{"bbox_2d": [1, 2, 30, 20], "label": "cup"}]', 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAT_LINES)
@pytest.mark.parametrize("as_list", [False, True])
def test_chat_data_is_read_in_the_forms_that_people_have(root, name, as_list):
    line, question, answer, num_images = CHAT_LINES[name]
    [sample] = read_samples(write_list(root, line) if as_list else write(root, line), root)
    assert (sample.question, sample.answer, len(sample.images)) == (question, answer, num_images)
    assert sample.has_boxes == ("[1, 2, 30, 20]" in answer) and sample.extra == {}
    content = chat_messages(sample, "plain")[0]["content"]
    assert [part["type"] for part in content].count("image") == num_images


CHAT_REFUSALS = {  # name: (line, reason)
    "a system message": ({"messages": [SYSTEM, USER, ASSISTANT], "image": "a.png"}, "put its text into --template"),
    "a long conversation": ({"messages": [USER, ASSISTANT, USER, ASSISTANT], "image": "a.png"}, "found 4 turns"),
    "a question alone": ({"messages": [USER], "image": "a.png"}, "found 1 turns"),
    "two answers": ({"messages": [USER, ASSISTANT], "solution": "Kane", "image": "a.png"}, "found 3 turns"),
    "an answer that asks": ({"messages": [USER, USER], "image": "a.png"}, "turns by ['user', 'user']"),
    "a message without content": ({"messages": [{"role": "user"}, ASSISTANT]}, 'with a "value" or "content"'),
    "a video": ({"messages": [USER | {"content": VIDEO_PARTS}, ASSISTANT]}, "the question is [{'type': 'video'}"),
    "an image in the answer": (
        {"messages": [USER, ASSISTANT | {"content": TRL_PARTS}], "image": "a.png"},
        "the answer",
    ),
    "image and images": ({"messages": [USER, ASSISTANT], "image": "a", "images": ["a"]}, 'both "image" and "images"'),
    "an image written out": ({"messages": [USER, ASSISTANT], "images": [{"bytes": "iVBORw0K"}]}, "a list of paths"),
    "a part without its image": ({"messages": [USER | {"content": TRL_PARTS}, ASSISTANT]}, "1 <image> marks for 0"),
}


@pytest.mark.parametrize("name", CHAT_REFUSALS)
def test_chat_data_that_is_not_one_question_and_one_answer_is_refused(root, name):
    line, reason = CHAT_REFUSALS[name]
    with pytest.raises(ValueError, match="train.jsonl:2: ") as error:
        read_samples(write(root, record(), line), root)
    assert reason in str(error.value)


def test_a_sample_without_an_id_is_named_by_file_and_line_however_the_path_is_typed(root, monkeypatch):
    anonymous = {key: value for key, value in record().items() if key != "id"}
    path = write(root, record(), anonymous, record() | {"id": None})
    monkeypatch.chdir(root)
    for typed in (path, Path("train.jsonl"), Path("..") / root.name / "train.jsonl"):
        samples = read_samples(typed, root)
        assert [sample.id for sample in samples] == ["7", "train.jsonl:2", "train.jsonl:3"]
        assert samples[1].source == f"{typed}:2"
    [sample] = read_samples(write_list(root, anonymous), root)
    assert (sample.id, sample.source) == ("eval.json, item 1", f"{root}/eval.json, item 1")


def test_keys_that_are_not_ours_are_kept_for_rewards(root):
    more = {"dataset": "refcoco", "height": 30, "boxes": [[1, 2], {"a": None}]}
    lines = [record(), record(), record(**more), record(**more), record(difficulty=2)]
    samples = read_samples(write(root, *lines), root)
    assert [sample.extra for sample in samples] == [{}, {}, more, more, {"difficulty": 2}]
    assert samples[0].extra is samples[1].extra and samples[2].extra is samples[3].extra  # they cost memory once
    assert Sample("s", "q", "a", (), "", False, "here").extra == {}
    [sample] = read_samples(write_list(root, {"problem": "q", "solution": "a", "accu_reward_method": "mcq"}), root)
    assert sample.extra == {}


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


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{broken", "not JSON"),
        ("[1, 2]", "an object is expected"),
        ({"image": "a.png"}, "none of conversations, messages, prompt, problem"),
        (record(question=" "), "question"),
        (record(question=["x"]), "question"),
        (record(image=3), '"image" is 3'),
        (record(image=[""]), '"image"'),
        (record(video="a.mp4"), '"video" is given; "image" or "images" names the pictures, and videos are not read'),
        (record(img="a.png"), '"img" is given'),
        (record(question="<image> and <image>"), "2 <image> marks for 1 images"),
        (record("[30, 2, 1, 20]"), "swapped"),
        (record("[1, 20, 30, 2]"), "swapped"),
        (record("[1, 2, 1, 20]"), "no area"),
        (record("[1, 2, NaN, 20]"), "swapped corners or no area"),
        (record('[{"bbox_2d": [5, 5, 1, 1], "label": "cat"}]'), "swapped"),
        (record(accu_reward_method="llm"), "accu_reward_method"),
        ({"conversations": [{"value": "only one"}]}, "conversations"),
        ({"conversations": [{"value": "q"}, {"value": "a"}, {"value": "q"}]}, "found 3 turns"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_reason(root, line, reason):
    path = write(root, record(), line)
    with pytest.raises(ValueError, match="train.jsonl:2: ") as error:
        read_samples(path, root)
    assert reason in str(error.value)


def test_a_bad_item_of_a_list_is_named_with_its_number(root):
    path = write_list(root, record(), record(), record(question=" "))
    with pytest.raises(ValueError, match=r"eval.json, item 3: the question is ' '"):
        read_samples(path, root)
    path.write_text("[" + json.dumps(record()) + ",\n {'a': 1}]")
    with pytest.raises(ValueError, match=r"eval.json: not JSON: .*line 2 column 3"):
        read_samples(path, root)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_of_one_object_is_refused_and_a_list_or_lines_are_read(root, indent):
    path = root / "train.json"
    path.write_text(json.dumps(record(), indent=indent))
    with pytest.raises(
        ValueError, match="train.json: holds one object" if indent is None else "train.json:1: not JSON"
    ):
        read_samples(path, root)
    path.write_text(json.dumps([record()], indent=indent))
    assert len(read_samples(path, root)) == 1
    path.write_text(json.dumps(record()) + "\n" + json.dumps(record()))
    assert len(read_samples(path, root)) == 2


def test_a_swapped_box_that_may_be_x_y_width_height_says_so(root):
    with pytest.raises(ValueError, match=r"If this is x, y, width, height, write \[30, 2, 31, 22\]"):
        read_samples(write(root, record("[30, 2, 1, 20]")), root)
    for box in ("[30, 2, 1, -20]", "[-30, 9, 40, 2]", "[1, 2, NaN, 20]"):
        with pytest.raises(ValueError, match="swapped corners or no area") as error:
            read_samples(write(root, record(box)), root)
        assert "width" not in str(error.value)


def test_a_path_made_on_windows_is_named_as_the_cause(root):
    (root / "sub").mkdir()
    with pytest.raises(ValueError, match='train.jsonl:1: .*a.png\' is no file.*must have "/" for each backslash'):
        check_samples(read_samples(write(root, record(image="sub\\a.png")), root))
    with pytest.raises(ValueError, match="is no file") as error:
        check_samples(read_samples(write(root, record(image="sub/a.png")), root))
    assert "backslash" not in str(error.value)
    (root / "odd\\name.png").write_bytes((root / "a.png").read_bytes())
    check_samples(read_samples(write(root, record(image="odd\\name.png")), root))  # elsewhere it is a letter


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


def test_the_sizes_that_were_read_come_back_and_boxes_may_be_left_to_another_check(root):
    samples = read_samples(write(root, record(), record("[1, 1, 22, 5]", image="b.jpg")), root)
    assert check_samples(samples, boxes=False) == {str(root / "a.png"): (40, 30), str(root / "b.jpg"): (20, 60)}
    assert check_samples(samples[:1]) == {str(root / "a.png"): (40, 30)}
    with pytest.raises(BadSample, match="leaves its image of 20 x 60 pixels"):
        check_samples(samples)


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
