"""tools/prepare.py on hand-made annotations: data.py reads what it writes, the rewards pay it, broken files stop."""

import copy
import json
import math
import random
from collections import Counter

import pytest
from PIL import Image

from data import check_samples, read_samples, unfence
from rewards import REWARDS
from tools.prepare import Config, convert, corner_box, main

NAMES = ["cat", "dog", "cow", "a red bus, parked", "Käse", "hen", "owl", "fox"]
SIZE = {"width": 40, "height": 30}
ONE = {
    "images": [{"id": 5, "file_name": "5.png", **SIZE}],
    "annotations": [{"id": 9, "image_id": 5, "category_id": 1, "bbox": [1, 2, 10, 5]}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}


def mark(number, image, category, bbox, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, **more}


def zoo(num_images=30):
    """Images with one to six of eight classes, one to three boxes each."""
    rng, marks = random.Random(1), []
    for image in range(num_images):
        for category in rng.sample(range(len(NAMES)), rng.randint(1, 6)):
            for _ in range(rng.randint(1, 3)):
                bbox = [rng.randint(0, 20), rng.uniform(0, 12), rng.uniform(2, 20), rng.randint(2, 17)]
                marks.append(mark(len(marks), image, category, bbox))
    return {
        "images": [{"id": number, "file_name": f"{number}.png", **SIZE} for number in range(num_images)],
        "annotations": marks,
        "categories": [{"id": number, "name": name} for number, name in enumerate(NAMES)],
    }


def write(tmp_path, value, name="marks.json"):
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def prepare(tmp_path, value, **options):
    """The lines written, each with the classes it asks and the items of its answer."""
    out = tmp_path / "ovd.jsonl"
    convert(write(tmp_path, value), Config(out=str(out), **options))
    records = [json.loads(line) for line in out.read_text().splitlines()]
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        record["asked"] = json.loads(question[question.index("objects: ") + 9 : question.index(". Output each")])
        record["items"] = [] if answer == "None" else json.loads(unfence(answer))
    return records


def labels(record):
    return {item["label"] for item in record["items"]}


def changed(*path, to):
    """ONE with the value at that path replaced, or removed where `to` is KeyError."""
    value = copy.deepcopy(ONE)
    place = value
    for key in path[:-1]:
        place = place[key]
    if to is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return value


# ---- what is written -----------------------------------------------------------------------------------------------


def test_an_annotation_becomes_a_line_in_the_format_of_vlm_r1(tmp_path):
    [line] = prepare(tmp_path, ONE, negatives=0, none_share=0.0, image_prefix="train")
    question, answer = line["conversations"]
    assert (line["id"], line["image"], line["accu_reward_method"]) == ("5-0", "train/5.png", "odLength")
    assert question == {
        "from": "human",
        "value": "<image>Please carefully check the image and detect the following objects: [\"cat\"]. Output each "
        "detected target's bbox coordinates in JSON format. The format of the bbox coordinates is: ```json "
        '[{"bbox_2d": [x1, y1, x2, y2], "label": "target name"}, ...] ```. If there are no such targets in the image, '
        "simply respond with None.",
    }  # fmt: skip
    assert answer == {"from": "gpt", "value": '```json\n[{"bbox_2d": [1, 2, 11, 7], "label": "cat"}]\n```'}


def test_data_reads_the_file_and_its_answers_earn_the_full_reward(tmp_path):
    for number in range(30):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.png")
    records = prepare(tmp_path, zoo(), none_share=0.3)
    samples = read_samples(tmp_path / "ovd.jsonl", tmp_path)
    check_samples(samples)
    assert len(samples) == len(records) and len({sample.id for sample in samples}) == len(samples)
    nones = [sample for sample in samples if sample.answer == "None"]
    assert 0 < len(nones) < len(samples)
    for sample in samples:
        assert sample.reward == "od_length" and sample.has_boxes == (sample.answer != "None")
        assert REWARDS["od_length"](f"<think></think><answer>{sample.answer}</answer>", sample.answer) == 1.0
    wrong = '<answer>```json\n[{"bbox_2d": [1, 2, 11, 7], "label": "cat"}]\n```</answer>'
    assert {REWARDS["od_length"](wrong, sample.answer) for sample in nones} == {0.0}


def test_every_class_is_asked_for_once_and_the_answer_holds_all_its_boxes(tmp_path):
    annotations = zoo()
    answered = [(r["image"], i["label"]) for r in prepare(tmp_path, annotations, max_classes=2) for i in r["items"]]
    marked = [(f"{m['image_id']}.png", NAMES[m["category_id"]]) for m in annotations["annotations"]]
    assert sorted(answered) == sorted(marked)
    asked = [(r["image"], name) for r in prepare(tmp_path, annotations, max_classes=2) for name in labels(r)]
    assert len(asked) == len(set(asked))


def test_negatives_are_absent_and_as_many_as_the_option_says(tmp_path):
    annotations = zoo()
    marked = {(f"{m['image_id']}.png", NAMES[m["category_id"]]) for m in annotations["annotations"]}
    for negatives in (0, 1, 2):
        for record in prepare(tmp_path, annotations, negatives=negatives):
            absent = set(record["asked"]) - labels(record)
            assert not any((record["image"], name) in marked for name in absent)
            assert len(record["asked"]) == len(set(record["asked"]))
            if record["items"]:
                assert len(absent) == negatives and len(labels(record)) <= 4


def test_the_share_of_none_prompts_is_that_of_the_option(tmp_path):
    assert all(record["items"] for record in prepare(tmp_path, zoo(400), none_share=0.0))
    for share in (0.1, 0.5):
        records = prepare(tmp_path, zoo(400), none_share=share)
        nones = sum(not record["items"] for record in records) / len(records)
        assert abs(nones - share) < 4 * (share * (1 - share) / len(records)) ** 0.5  # four standard deviations


def test_present_and_absent_classes_are_shuffled_together(tmp_path):
    firsts = [record["asked"][0] in labels(record) for record in prepare(tmp_path, zoo(), none_share=0.0)]
    assert any(firsts) and not all(firsts)


def test_small_boxes_are_dropped_but_their_class_does_not_count_as_absent(tmp_path):
    value = changed("annotations", to=[mark(1, 5, 1, [1, 1, 9, 3]), mark(2, 5, 2, [1, 1, 4, 4])])
    records = prepare(tmp_path, value, min_size=4.0, none_share=0.5)
    assert [(record["asked"], labels(record)) for record in records] == [(["dog"], {"dog"})]


def test_prompts_with_too_many_boxes_are_left_out(tmp_path):
    marks = [mark(number, 5, 1, [number, 1, 9, 9]) for number in range(3)] + [mark(3, 5, 2, [1, 1, 4, 4])]
    value = changed("annotations", to=marks)
    options = {"max_classes": 1, "none_share": 0.0}
    assert sorted(len(record["items"]) for record in prepare(tmp_path, value, max_boxes=3, **options)) == [1, 3]
    assert [len(record["items"]) for record in prepare(tmp_path, value, max_boxes=2, **options)] == [1]


def test_prompts_that_are_left_out_are_counted(tmp_path):
    value = zoo()
    marked = {(m["image_id"], m["category_id"]) for m in value["annotations"]}
    options = {"max_classes": 1, "max_boxes": 1, "none_share": 0.0}  # a class is left out if it has two boxes or three
    counts = convert(write(tmp_path, value), Config(out=str(tmp_path / "ovd.jsonl"), **options))
    assert 0 < counts["crowded"] == len(marked) - counts["prompts"]
    counts = convert(write(tmp_path, value), Config(out=str(tmp_path / "ovd.jsonl"), max_boxes=3))
    classes = Counter(image for image, _ in marked)
    groups = sum(math.ceil(number / 4) for number in classes.values())  # four classes a prompt
    assert 0 < counts["crowded"] == groups - (counts["prompts"] - counts["none"])


def test_a_class_with_a_crowd_is_not_asked_for_in_that_image_alone(tmp_path):
    value = copy.deepcopy(ONE)
    value["images"].append({"id": 6, "file_name": "6.png", **SIZE})
    value["annotations"] += [
        mark(10, 5, 1, [0, 0, 30, 30], iscrowd=1),
        mark(11, 5, 2, [0, 0, 9, 9], iscrowd=0),
        mark(12, 6, 1, [0, 0, 9, 9]),
    ]
    records = prepare(tmp_path, value, none_share=0.5)
    assert {name for r in records if r["image"] == "5.png" for name in r["asked"]} == {"dog"}
    assert {name for r in records if r["image"] == "6.png" for name in r["asked"]} == {"cat", "dog"}


def test_lvis_lists_which_classes_are_absent_and_which_are_not_marked_exhaustively(tmp_path):
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES)]
    image = {"id": 5, "coco_url": "http://images.cocodataset.org/val2017/5.jpg", **SIZE}
    image |= {"neg_category_ids": [3, 5, 6], "not_exhaustive_category_ids": [1, 6]}
    marks = [mark(1, 5, 0, [1, 1, 9, 9]), mark(2, 5, 1, [1, 1, 9, 9])]
    value = {"images": [image], "annotations": marks, "categories": categories}
    records = prepare(tmp_path, value, negatives=5, none_share=0.8)
    assert {record["image"] for record in records} == {"val2017/5.jpg"}
    assert set(records[0]["asked"]) == {"cat", NAMES[3], "hen"} and labels(records[0]) == {"cat"}
    assert all(set(record["asked"]) == {NAMES[3], "hen"} for record in records[1:])
    image["neg_category_ids"] = []
    assert [record["asked"] for record in prepare(tmp_path, value, none_share=0.8)] == [["cat"]]


@pytest.mark.parametrize(
    ("bbox", "box"),
    [
        ([1, 2, 3, 4], [1, 2, 4, 6]),
        ([0.123, 2, 3.333, 4], [0.12, 2, 3.46, 6]),
        ([-3, -2.5, 10, 10], [0, 0, 7, 7.5]),
        ([30, 20, 100.5, 100], [30, 20, 40, 30]),
        ([1, 2, 0, 4], None),
        ([1, 2, 3, -4], None),
        ([1, 2, 0.001, 4], None),
    ],
)
def test_boxes_are_corners_inside_the_image_with_two_decimals(bbox, box):
    found = corner_box(bbox, SIZE, "here")
    assert found == box and (box is None or [type(a) for a in found] == [type(b) for b in box])


def test_the_output_depends_on_the_seed_and_not_on_the_order_of_the_file(tmp_path):
    def written(value, seed=3):
        prepare(tmp_path, value, seed=seed)
        return (tmp_path / "ovd.jsonl").read_bytes()

    annotations = zoo()
    turned = {key: [dict(reversed(r.items())) for r in reversed(annotations[key])] for key in reversed(annotations)}
    assert written(annotations) == written(annotations) == written(turned)
    assert written(annotations) != written(annotations, seed=4)


# ---- what is refused -----------------------------------------------------------------------------------------------

IMAGE, MARK, CATEGORY = ("images", 0), ("annotations", 0), ("categories", 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "not JSON.*one JSON object"),
        ("[1, 2", "not JSON.*one JSON object"),
        ("[" * 100_000, "not JSON"),
        ("[]", 'no list "categories"'),
        (changed("images", to=KeyError), 'no list "images"'),
        (changed("annotations", to={}), 'no list "annotations"'),
        (changed(*IMAGE, to=3), r"images\[0\]: id is None"),
        (changed(*MARK, "id", to=KeyError), r"annotations\[0\]: id is None"),
        (changed(*CATEGORY, "id", to=[1]), r"categories\[0\]: id is \[1\]"),
        (changed(*MARK, "bbox", to=KeyError), "annotations id 9: no bbox; add"),
        (changed(*MARK, "image_id", to=KeyError), "annotations id 9: no image_id"),
        (changed(*CATEGORY, "name", to=KeyError), "categories id 1: no name"),
        (changed(*IMAGE, "width", to=KeyError), "images id 5: no width"),
        (changed(*IMAGE, "height", to=-3), "image 5: height is -3; it must be a whole number"),
        (changed(*IMAGE, "file_name", to=KeyError), "image 5: file_name is None; add"),
        (changed("images", to=ONE["images"] * 2), "images id 5 .*twice"),
        (changed("annotations", to=ONE["annotations"] * 2), "annotations id 9 .*twice"),
        (
            changed("categories", 1, "name", to="cat"),
            "category 2: category 1 is named 'cat' too; merge the two or rename",
        ),
        (changed(*CATEGORY, "name", to="a ```"), "category 1: the name is 'a ```'"),
        (changed(*CATEGORY, "name", to=" "), "category 1: the name is ' '"),
        (changed(*MARK, "image_id", to=6), "annotation 9: image_id 6 is unknown; add that entry or drop"),
        (changed(*MARK, "category_id", to=3), "annotation 9: category_id 3 is unknown"),
        (changed(*MARK, "category_id", to=[]), r"annotation 9: category_id \[\] is unknown"),
        (changed(*MARK, "iscrowd", to=2), "annotation 9: iscrowd is 2"),
        (changed(*MARK, "bbox", to=[1, 2, 3]), r"annotation 9: bbox is \[1, 2, 3\]; .*four finite numbers"),
        (changed(*MARK, "bbox", to=[1, 2, 3, float("nan")]), "annotation 9: bbox is .*nan"),
        (changed(*MARK, "bbox", to=[1, 2, 3, 10**400]), "annotation 9: bbox is "),
        (changed(*MARK, "bbox", to=[1, 2, "3", 4]), "annotation 9: bbox is "),
        (changed(*MARK, "bbox", to=[1, 2, 0, 4]), r"annotation 9: bbox \[1, 2, 0, 4\] has no area.*skip_empty_boxes"),
        (changed(*MARK, "bbox", to=[40, 2, 3, 4]), "annotation 9: bbox .* outside its image of 40 x 30"),
        (changed(*MARK, "bbox", to=[1, -9, 3, 4]), "annotation 9: bbox .* outside its image of 40 x 30"),
        (changed(*IMAGE, "neg_category_ids", to=[7]), r"image 5: neg_category_ids is \[7\]"),
        (changed(*MARK, "iscrowd", to=1), "no prompt for any of its 1 images: .*; lower min_size"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_nothing_is_written(tmp_path, value, message):
    with pytest.raises(ValueError, match=rf"marks\.json: (?s:.*){message}"):
        prepare(tmp_path, value)
    assert [path.name for path in tmp_path.iterdir()] == ["marks.json"]


def test_empty_boxes_are_dropped_on_request_but_their_class_does_not_count_as_absent(tmp_path):
    value = changed("annotations", to=[*ONE["annotations"], mark(10, 5, 2, [1, 1, 9, 0])])
    assert [record["asked"] for record in prepare(tmp_path, value, skip_empty_boxes=True)] == [["cat"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--negatives", "-1"], "negatives is -1"),
        (["--none_share", "1"], "none_share is 1.0"),
        (["--max_classes", "0"], "max_classes is 0"),
        (["--min_size", "nan"], "min_size is nan"),
        (["--max_boxes", "0"], "max_boxes is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--out", "nowhere/ovd.jsonl"], "out is 'nowhere/ovd.jsonl'"),
        (["--out", "marks.json"], "that is the annotation file"),
        (["--negative", "3"], "--negative"),
        (["more.json"], "more.json"),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, ONE)
    with pytest.raises(ValueError, match=message):
        main(["coco", "marks.json", *options])


@pytest.mark.parametrize("argv", [[], ["coco"], ["voc", "marks.json"], ["coco", "--out", "ovd.jsonl"]])
def test_an_incomplete_command_shows_the_usage(argv):
    with pytest.raises(SystemExit, match=r"usage: python -m tools\.prepare coco"):
        main(argv)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such annotation file"):
        main(["coco", str(tmp_path / "none.json"), "--out", str(tmp_path / "ovd.jsonl")])


def test_the_command_prints_what_it_wrote_and_what_it_left_out(tmp_path, capsys):
    value = changed("images", to=[*ONE["images"], {"id": 6, "file_name": "6.png", **SIZE}])
    out = tmp_path / "ovd.jsonl"
    main(["coco", str(write(tmp_path, value)), "--out", str(out), "--none_share", "0"])
    assert capsys.readouterr().out == (
        f"{out}: 1 prompts on 1 images, with 1 boxes; the answer to 0 prompts is None\n"
        "left out: 0 prompts with more than 30 boxes, 1 images without a prompt\n"
    )
