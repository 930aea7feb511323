"""infra/datacheck.py: wrong coordinates are told apart from right ones, whatever the data looks like.

Boxes are drawn as in real data sets and then written in the wrong form; expected verdicts follow from the form alone.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import BadSample, Sample, read_samples
from infra.datacheck import check_data, draw_samples, refuse_or_warn, statistics_text
from infra.mix import DataFile, read_mix

PHOTOS = [(640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (612, 612), (333, 500)]  # sizes of COCO
SCREENS = [(1920, 1080), (1080, 2400), (1440, 900), (390, 844)]
CAMERA = [(4000, 3000), (3000, 4000), (2048, 1536), (1600, 1300)]
TINY = [(1, 1), (2, 2), (4, 6), (8, 8)]


def objects(rng, count, sizes, *, smallest=0.02, largest=1.0, centre=0.5, spread=0.25):
    """(boxes [count, 4] in pixels, frames [count, 2]): log-normal sizes, centres around a point, cut at the edges."""
    frames = np.array([sizes[i] for i in rng.integers(len(sizes), size=count)], dtype=float)
    extent = np.exp(rng.normal(np.log(0.3), 0.6, (count, 2))).clip(smallest, largest)
    middle = rng.normal(centre, spread, (count, 2)).clip(0, 1)
    low, high = (
        ((middle - extent / 2).clip(0, 1) * frames).round(2),
        ((middle + extent / 2).clip(0, 1) * frames).round(2),
    )
    high = np.maximum(high, low + 0.01)
    return np.concatenate([low, high], 1), frames


def full_images(rng, count, sizes):
    frames = np.array([sizes[i] for i in rng.integers(len(sizes), size=count)], dtype=float)
    return np.concatenate([0 * frames, frames], 1), frames


def centred(rng, count, sizes):
    """Products photographed right in the middle."""
    frames = np.array([sizes[i] for i in rng.integers(len(sizes), size=count)], dtype=float)
    margin = (frames * rng.uniform(0.05, 0.3, (count, 2))).round()
    return np.concatenate([margin, frames - margin], 1), frames


def scenes(rng, count, sizes):
    """Small shapes on 64 x 64 pixels, as in the toy."""
    low = rng.integers(0, 44, (count, 2))
    return np.concatenate([low, low + rng.integers(8, 20, (count, 2))], 1).astype(float), np.full((count, 2), 64.0)


def logos(rng, count, sizes):
    return objects(rng, count, sizes, centre=0.15, spread=0.08, largest=0.2)


def icons(rng, count, sizes):
    return objects(rng, count, sizes, centre=0.05, spread=0.02, largest=0.05)


def from_the_corner(rng, count, sizes):
    frames = np.array([sizes[i] for i in rng.integers(len(sizes), size=count)], dtype=float)
    return np.concatenate([0 * frames, frames * rng.uniform(0.1, 1, (count, 2))], 1), frames


RIGHT = {
    "photos": (objects, PHOTOS),
    "screenshots": (objects, SCREENS),
    "large photos": (objects, CAMERA),
    "photos of both kinds": (objects, PHOTOS + CAMERA),
    "images of a few pixels": (objects, TINY),
    "images of 1,000 x 1,000": (objects, [(1000, 1000)]),
    "images a little larger": (objects, [(1024, 1024), (1280, 1280)]),
    "small scenes": (scenes, None),
    "whole images": (full_images, PHOTOS + CAMERA),
    "whole images of a few pixels": (full_images, TINY),
    "objects in the middle": (centred, PHOTOS),
    "objects at the top left": (logos, SCREENS),
    "objects at the top left of photos": (logos, CAMERA),
    "small objects at the top left of photos": (icons, CAMERA),
    "boxes that begin at the corner": (from_the_corner, PHOTOS),
}


def make_samples(boxes, frames, name="train.jsonl"):
    """(samples, sizes) with one box and one image each."""
    samples, sizes = [], {}
    for number, (box, frame) in enumerate(zip(boxes.tolist(), frames.tolist(), strict=True), 1):
        sizes[f"{number}.jpg"] = (int(frame[0]), int(frame[1]))
        samples.append(Sample(str(number), "q", json.dumps(box), (f"{number}.jpg",), "", True, f"data/{name}:{number}"))
    return samples, sizes


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("count", [1, 3, 20, 100])
def test_correct_boxes_raise_no_alarm(name, count):
    draw, sizes = RIGHT[name]
    for seed in range(25):
        assert refuse_or_warn(*make_samples(*draw(np.random.default_rng(seed), count, sizes))) == []


def as_shares(boxes, frames):
    return (boxes / np.tile(frames, 2)).round(4)


def as_thousandths(boxes, frames):
    return (1000 * boxes / np.tile(frames, 2)).round()


def exchanged(boxes, frames):
    return boxes[:, [1, 0, 3, 2]]


@pytest.mark.parametrize("count", [1, 20, 400])
@pytest.mark.parametrize("name", ["photos", "large photos", "small scenes", "whole images", "objects in the middle"])
def test_shares_of_the_image_are_refused_with_their_numbers(name, count):
    draw, sizes = RIGHT[name]
    for seed in range(8):
        boxes, frames = draw(np.random.default_rng(seed), count, sizes)
        shares = as_shares(boxes, frames)
        with pytest.raises(ValueError, match="^data/train.jsonl: .*Multiply x by the width") as error:
            refuse_or_warn(*make_samples(shares, frames))
        assert f"its {count} boxes lie between {shares.min():g} and {shares.max():g}" in str(error.value)


def test_one_pixel_among_the_shares_is_enough_to_doubt():
    boxes, frames = objects(np.random.default_rng(0), 30, PHOTOS)
    shares = as_shares(boxes, frames)
    shares[7] = [0, 0, 100, 100]
    assert refuse_or_warn(*make_samples(shares, frames)) == []


@pytest.mark.parametrize("count", [50, 400])
def test_y_before_x_is_refused_where_boxes_leave_their_image(count):
    for seed in range(8):
        boxes, frames = objects(np.random.default_rng(seed), count, PHOTOS)
        with pytest.raises(ValueError, match=r"and 0 would if y came before x.*Write \[x1, y1, x2, y2\]"):
            refuse_or_warn(*make_samples(exchanged(boxes, frames), frames))


def test_one_wrong_box_among_many_is_left_to_the_check_of_each_box():
    boxes, frames = scenes(np.random.default_rng(0), 400, None)
    boxes[3] = [10, 10, 20, 70]  # inside if y came first, but so are all others
    frames[3] = (80, 64)
    assert refuse_or_warn(*make_samples(boxes, frames)) == []


@pytest.mark.parametrize("name, count", [("photos", 50), ("photos", 400), ("small scenes", 400), ("whole images", 20)])
def test_thousandths_are_refused_where_boxes_leave_their_image(name, count):
    draw, sizes = RIGHT[name]
    for seed in range(8):
        boxes, frames = draw(np.random.default_rng(seed), count, [(640, 480), (480, 640)] if sizes else None)
        moved = as_thousandths(boxes, frames)
        moved[0] = [10, 10, 990, 990]
        with pytest.raises(ValueError, match="0..1000 on both axes.*Multiply x by width / 1000"):
            refuse_or_warn(*make_samples(moved, frames))


def test_thousandths_inside_large_images_are_a_warning():
    for seed in range(8):
        boxes, frames = objects(np.random.default_rng(seed), 200, CAMERA)
        [warning] = refuse_or_warn(*make_samples(as_thousandths(boxes, frames), frames))
        assert "none goes beyond 1000" in warning and "width / 1000" in warning


def test_widths_and_heights_in_place_of_corners_are_a_warning():
    """Only objects larger than their distance from the edge: read_samples refuses the others one by one."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        frames = np.array([PHOTOS[i] for i in rng.integers(len(PHOTOS), size=200)], dtype=float)
        extent = frames * rng.uniform(0.55, 0.9, (200, 2))
        low = (frames - extent) * rng.uniform(0, 1, (200, 2))
        [warning] = refuse_or_warn(*make_samples(np.concatenate([low, extent], 1).round(2), frames))
        assert "write [x, y, x + width, y + height]" in warning
        assert refuse_or_warn(*make_samples(np.concatenate([low, low + extent], 1).round(2), frames)) == []


def test_only_boxes_in_images_of_known_size_are_looked_at():
    boxes, frames = objects(np.random.default_rng(0), 30, PHOTOS)
    samples, sizes = make_samples(as_shares(boxes, frames), frames)
    assert refuse_or_warn(samples, {}) == []
    text = Sample("s", "q", "7", (), "", False, "data/train.jsonl:31")
    assert refuse_or_warn([text], sizes) == []
    with pytest.raises(ValueError, match="30 boxes"):
        refuse_or_warn([*samples, text], sizes)


def test_a_large_file_is_looked_at_in_part():
    boxes, frames = objects(np.random.default_rng(0), 30, PHOTOS)
    samples, sizes = make_samples(as_shares(boxes, frames), frames)
    with pytest.raises(ValueError, match="its 20,0[0-9]{2} boxes|its 15,000 boxes"):
        refuse_or_warn(samples * 1000, sizes)


# ---- files on disk -------------------------------------------------------------------------------------------------


def write_file(root, boxes, name="train.jsonl", size=(64, 48)):
    """Samples of a file whose boxes are given, each about an image of its own."""
    lines = []
    for number, box in enumerate(boxes):
        image = f"{name}-{number}.png"
        Image.new("RGB", size, (40, 90, 160)).save(root / image)
        lines.append(json.dumps({"image": image, "problem": f"the thing number {number}", "solution": box}))
    (root / name).write_text("\n".join(lines))
    return read_samples(root / name, root)


def test_a_run_is_refused_by_the_file_as_a_whole_before_single_boxes(tmp_path):
    good = write_file(tmp_path, [[1, 2, 30, 20], [4, 4, 60, 40]])
    sizes, warnings = check_data([good])
    assert warnings == [] and set(sizes.values()) == {(64, 48)} and len(sizes) == 2
    with pytest.raises(ValueError, match="shares.jsonl: all coordinates of its 1 boxes"):
        check_data([good, write_file(tmp_path, [[0.1, 0.2, 0.9, 0.8]], "shares.jsonl")])
    with pytest.raises(ValueError, match="exchanged.jsonl: 2 of its 2 boxes leave .* y came before x"):
        check_data([good, write_file(tmp_path, [[1, 1, 30, 60], [4, 4, 40, 55]], "exchanged.jsonl")])
    with pytest.raises(BadSample, match="single.jsonl:2: box .* leaves its image of 64 x 48 pixels"):
        check_data([good, write_file(tmp_path, [[1, 1, 30, 20], [4, 4, 70, 60], [9, 9, 12, 12]], "single.jsonl")])


def test_missing_images_are_refused_first(tmp_path):
    samples = write_file(tmp_path, [[0.1, 0.2, 0.9, 0.8]])
    (tmp_path / "train.jsonl-0.png").unlink()
    with pytest.raises(ValueError, match="train.jsonl:1: .*is no file"):
        check_data([samples])


def test_statistics_are_the_hand_computed_ones():
    boxes = np.array([[0, 0, 10, 10], [90, 0, 100, 20], [45, 45, 55, 55], [0, 0, 100, 100.0]])
    samples, sizes = make_samples(boxes, np.full((4, 2), 100.0))
    sizes["2.jpg"] = (100, 200)
    two = json.dumps([{"bbox_2d": [0, 50, 50, 100]}, {"bbox_2d": [0, 50, 100, 100]}])
    samples += [
        Sample("5", "q", two, ("3.jpg", "4.jpg"), "", True, "f:5"),
        Sample("6", "q", "7", (), "", False, "f:6"),
    ]
    lines = statistics_text(samples, sizes).split("\n")
    assert lines[0] == "6 samples: 5 with boxes, 1 without; 1 without an image, 1 with several"
    assert lines[1] == "4 images opened: 100 x 100 pixels (median), from 100 x 100 to 100 x 200"
    assert lines[2] == "boxes of a sample: 1 (median), at most 2"
    # Shares: 1, 1, 1, 25, 50 and 100%; centres: top left, top right, middle, middle, bottom left, bottom middle.
    assert lines[3] == "a box covers 13% of its image (median); half of the boxes 1% to 43.8%, all 1% to 100%"
    assert [line.split() for line in lines[5:]] == [
        ["top", "17%", "0%", "17%"],
        ["middle", "0%", "33%", "0%"],
        ["bottom", "17%", "17%", "0%"],
    ]


def test_statistics_of_text_alone_are_one_line():
    text = Sample("s", "q", "7", (), "", False, "here")
    assert statistics_text([text] * 3, {}) == "3 samples: 0 with boxes, 3 without; 3 without an image, 0 with several"


def test_the_sheet_shows_boxes_where_they_are(tmp_path):
    [sample] = write_file(tmp_path, [[16, 12, 48, 36]], size=(64, 48))
    draw_samples([sample], tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    red = np.argwhere(np.abs(pixels - (0xE6, 0x19, 0x4B)).sum(2) < 30)
    scale, gap = 470 / 64, 14
    top = gap + (352 - round(48 * scale)) // 2
    assert red.min(0).tolist() == pytest.approx([top + 12 * scale, gap + 16 * scale], abs=2)
    assert red.max(0).tolist() == pytest.approx([top + 36 * scale, gap + 48 * scale], abs=2)


def test_the_sheet_survives_whatever_samples_hold(tmp_path):
    samples = write_file(tmp_path, [[1, 2, 30, 20]] * 3, size=(64, 48))
    (tmp_path / "train.jsonl-0.png").unlink()
    (tmp_path / "train.jsonl-1.png").write_bytes(b"no picture")
    Image.new("RGB", (3000, 2)).save(tmp_path / "flat.png")
    flat = str(tmp_path / "flat.png")
    samples += [
        Sample("1", "<image>\u54ea\u4e00\u4e2a\0" * 200, "x" * 5000, (flat, flat), "", False, "here"),
        Sample("2", "q", "[0, 0, 1e8, 1e8]", (flat,), "", True, "here"),
        Sample("3", "q", '```json\n[{"bbox_2d": [1, 0, 9, 1], "label": 7}]\n```', (flat,), "", True, "here"),
        Sample("4", "q", '[{"bbox_2d": [1, 0, 9, 1], "label": "a\\nb \\ud83d"}]', (flat,), "", True, "here"),
        Sample("5", "q", '{"bbox_2d": [1, 0, 9, 1]}', (flat,), "", True, "here"),
        Sample("6", "what is 1 + 1?", "2", (), "", False, "here"),
    ]
    draw_samples(samples, tmp_path / "sheet.png", count=9)
    assert Image.open(tmp_path / "sheet.png").size == (4 * 484 + 14, 3 * 508 + 14)
    draw_samples(samples[:1], tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").size == (484 + 14, 508 + 14)


def test_the_sheet_shows_samples_spread_over_the_data(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("infra.datacheck._tile", lambda sample: shown.append(sample) or Image.new("RGB", (9, 9)))
    draw_samples(list(range(100)), tmp_path / "sheet.png", count=5)
    draw_samples(list(range(3)), tmp_path / "sheet.png", count=5)
    assert shown == [0, 20, 40, 60, 80, 0, 1, 2]


# ---- docs/data.md --------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")


def block(mark):
    """The code block behind a comment of the page."""
    return re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)[1]


def test_the_lines_of_the_page_are_read(tmp_path):
    blocks = re.findall(r"```json\n(\{.*?)```", PAGE, re.DOTALL)
    (tmp_path / "train.jsonl").write_text("".join(blocks))
    samples = read_samples(tmp_path / "train.jsonl", tmp_path)
    assert [sample.has_boxes for sample in samples] == [True, True, False, False]
    assert len({sample.answer for sample in samples}) == 2 and all(len(sample.images) == 1 for sample in samples)


@pytest.mark.parametrize(
    "form, box",
    [
        ("0..1", [0.25, 0.5, 0.75, 1]),
        ("0..1000", [250, 500, 750, 1000]),
        ("x, y, width, height", [16, 24, 32, 24]),
        ("y before x", [24, 16, 48, 48]),
    ],
)
def test_the_recipe_of_the_page_mends_each_wrong_form(tmp_path, monkeypatch, form, box):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / "a.png")
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": json.dumps(box)}]
    Path("wrong.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns}) + "\n")
    lines = block("recipe: boxes").splitlines()
    kept = [line for line in lines if not line.strip().startswith("box = ") or line.endswith(f"# from {form}")]
    assert len(kept) == len(lines) - 3
    exec("\n".join(kept), {})
    [sample] = read_samples("train.jsonl", "images")
    assert json.loads(sample.answer) == [16, 24, 48, 48]


def test_the_mix_of_the_page_is_read(tmp_path):
    (tmp_path / "mix.json").write_text(block("mix"))
    files = read_mix(str(tmp_path / "mix.json"), DataFile("", "", "", "rec", ("iou",), (1.0,)))
    assert [(file.name, file.share, file.has_boxes) for file in files] == [
        ("refcoco_train", 2, True), ("ovd", 1, True), ("geometry", 1, False)]  # fmt: skip
