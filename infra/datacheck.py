"""Looks at data files as a whole before training: wrong coordinates, statistics, and a picture of some samples.

A reward that stays flat is usually caused by coordinates: shares of the image, thousandths, a width and height in place
of a corner, y before x. Each box alone may look right; the file as a whole gives it away. What is certain is refused,
and what is likely gives a warning, both with the numbers and the remedy.
Left out: boxes in pixels of a resized image, which look like any others as long as they stay inside.
"""

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import IMAGE_MARK, BadSample, Sample, answer_boxes, check_boxes, check_samples, load_image, unfence

Sizes = dict[str, tuple[int, int]]  # (width, height) by path, as check_samples returns them

MAX_SAMPLES = 20_000  # of a file are looked at, evenly spread
FEWEST = 20  # boxes that make a pattern; fewer may look like anything
LARGE = 1200  # pixels on both sides: in such an image, boxes in 0..1000 stay far from the edges

# ---- the boxes of a file as a whole --------------------------------------------------------------------------------


def check_data(files: Sequence[list[Sample]], *, progress: bool = False) -> tuple[Sizes, list[str]]:
    """(image sizes, warnings) about the samples of each data file; refuses what check_samples refuses, and more.

    Each file is looked at as a whole before its boxes are checked one by one, so that the message names the cause.
    """
    samples = [sample for part in files for sample in part]
    sizes = check_samples(samples, boxes=False, progress=progress)
    warnings = [warning for part in files for warning in refuse_or_warn(part, sizes)]
    for sample in samples:
        if sample.images and sample.images[0] in sizes:
            check_boxes(sample, sizes[sample.images[0]])
    return sizes, warnings


def refuse_or_warn(samples: Sequence[Sample], sizes: Sizes) -> list[str]:
    """Warnings about the boxes of one data file; a ValueError if they cannot be pixels of the original images."""
    boxes, frames = boxes_and_frames(samples, sizes)
    if not len(boxes):
        return []
    file = re.sub(r"(:\d+|, item \d+)$", "", samples[0].source)
    certain = shares_of_image(boxes, frames) or y_before_x(boxes, frames) or thousandths(boxes, frames)
    if certain:
        raise ValueError(f"{file}: {certain}; see docs/data.md")
    likely = thousandths_in_large_images(boxes, frames), lengths(boxes, frames)
    return [f"{file}: {text}; see docs/data.md" for text in likely if text]


def boxes_and_frames(samples: Sequence[Sample], sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """The boxes [n, 4] in images of known size, and the width and height [n, 2] of the image of each."""
    boxes, frames = [], []
    for sample in samples[:: 1 + len(samples) // MAX_SAMPLES]:
        if sample.has_boxes and sample.images and sample.images[0] in sizes:
            found = answer_boxes(sample.answer)
            boxes += found
            frames += [sizes[sample.images[0]]] * len(found)
    return np.array(boxes, dtype=float).reshape(-1, 4), np.array(frames, dtype=float).reshape(-1, 2)


def shares_of_image(boxes: np.ndarray, frames: np.ndarray) -> str:
    """Why these boxes are shares of their images, or ""."""
    width, height = np.median(frames, axis=0).astype(int)
    if boxes.max() > 1.01 or min(width, height) <= 8:  # in an image of a few pixels a box of one pixel is no surprise
        return ""
    return (
        f"all coordinates of its {len(boxes):,} boxes lie between {boxes.min():g} and {boxes.max():g}, in images of "
        f"about {width:,} x {height:,} pixels: they are shares of the image and must be pixels. Multiply x by the "
        "width and y by the height of each image"
    )


def y_before_x(boxes: np.ndarray, frames: np.ndarray) -> str:
    """Why these boxes are [y1, x1, y2, x2], or ""."""
    leaving, exchanged = _count_leaving(boxes, frames), _count_leaving(boxes[:, [1, 0, 3, 2]], frames)
    if leaving < 0.01 * len(boxes) or leaving <= 4 * exchanged:
        return ""
    return (
        f"{leaving:,} of its {len(boxes):,} boxes leave their image, and {exchanged:,} would if y came before x: the "
        "file seems to hold [y1, x1, y2, x2]. Write [x1, y1, x2, y2]"
    )


def thousandths(boxes: np.ndarray, frames: np.ndarray) -> str:
    """Why these boxes are 0..1000 on both axes, or ""."""
    leaving = _count_leaving(boxes, frames)
    if leaving <= 0.1 * len(boxes) or boxes.min() < 0 or not 900 < boxes.max() <= 1000:
        return ""
    width, height = np.median(frames, axis=0).astype(int)
    return (
        f"{leaving:,} of its {len(boxes):,} boxes leave their image of about {width:,} x {height:,} pixels, and the "
        f"highest coordinate is {boxes.max():g}: they seem to be 0..1000 on both axes and must be pixels of the "
        "original image. Multiply x by width / 1000 and y by height / 1000; the run moves boxes into the model's space"
    )


def _count_leaving(boxes: np.ndarray, frames: np.ndarray) -> int:
    return int(((boxes[:, :2] < -1) | (boxes[:, 2:] > frames + 1)).any(1).sum())


def thousandths_in_large_images(boxes: np.ndarray, frames: np.ndarray) -> str:
    """Why these boxes may be 0..1000 on both axes although they stay inside their images, or ""."""
    large = boxes[(frames > LARGE).all(1)]
    x, y = large[:, 2:].max(0, initial=0)
    if len(large) < FEWEST or not (900 < x <= 1000 and 900 < y <= 1000):
        return ""
    return (
        f"its {len(large):,} boxes in images of more than {LARGE:,} x {LARGE:,} pixels reach x {x:g} and y {y:g}, and "
        "none goes beyond 1000. If they are 0..1000 on both axes, multiply x by width / 1000 and y by height / 1000"
    )


def lengths(boxes: np.ndarray, frames: np.ndarray) -> str:
    """Why these boxes may be [x, y, width, height], or "".

    When read like that, the corners of every object right of the middle or below it leave the image.
    """
    apart = (boxes[:, :2] > 0.05 * frames).any(1)  # boxes that begin at the top left look the same in both readings
    ends = ((boxes[:, :2] + boxes[:, 2:]) / frames)[apart]
    if len(ends) < FEWEST or (ends > 1 + 1 / frames[apart]).any():
        return ""
    if ends.max(0).min() < 0.95 or np.median(ends) > 0.9:  # objects at the top left; objects right in the middle
        return ""
    return (
        f"its {len(ends):,} boxes that begin away from the top left corner all stay inside their image when read as x, "
        "y, width, height, which corners hardly ever do. If that is what they are, write [x, y, x + width, y + height]"
    )


# ---- statistics ----------------------------------------------------------------------------------------------------


def statistics_text(samples: Sequence[Sample], sizes: Sizes) -> str:
    """What a data file holds, in a few lines: samples, image sizes, how large the boxes are and where they lie."""
    without = sum(not sample.images for sample in samples)
    several = sum(len(sample.images) > 1 for sample in samples)
    boxed = sum(sample.has_boxes for sample in samples)
    lines = [
        f"{len(samples):,} samples: {boxed:,} with boxes, {len(samples) - boxed:,} without; "
        f"{without:,} without an image, {several:,} with several"
    ]
    paths = dict.fromkeys(path for sample in samples for path in sample.images)
    known = [sizes[path] for path in paths if path in sizes]
    if known:
        by_area = sorted(known, key=lambda size: size[0] * size[1])
        chosen = np.median(known, axis=0).astype(int), by_area[0], by_area[-1]
        median, smallest, largest = (f"{width:,} x {height:,}" for width, height in chosen)
        lines.append(f"{len(known):,} images opened: {median} pixels (median), from {smallest} to {largest}")
    boxes, frames = boxes_and_frames(samples, sizes)
    if len(boxes):
        lines += _describe_boxes(samples, boxes, frames)
    return "\n".join(lines)


def _describe_boxes(samples: Sequence[Sample], boxes: np.ndarray, frames: np.ndarray) -> list[str]:
    looked_at = samples[:: 1 + len(samples) // MAX_SAMPLES]
    counts = [len(answer_boxes(sample.answer)) for sample in looked_at if sample.has_boxes]
    covered = 100 * (boxes[:, 2:] - boxes[:, :2]).prod(1) / frames.prod(1)
    low, quarter, half, most, high = (f"{share:.3g}%" for share in np.quantile(covered, (0, 0.25, 0.5, 0.75, 1)))
    thirds = ((boxes[:, :2] + boxes[:, 2:]) / 2 / frames * 3).astype(int).clip(0, 2)
    table = np.zeros((3, 3))
    np.add.at(table, (thirds[:, 1], thirds[:, 0]), 100 / len(boxes))
    rows = zip(("top", "middle", "bottom"), table, strict=True)
    return [
        f"boxes of a sample: {np.median(counts):g} (median), at most {max(counts):,}",
        f"a box covers {half} of its image (median); half of the boxes {quarter} to {most}, all {low} to {high}",
        "centres of the boxes:  left  middle   right",
        *(f"{name:>21}" + "{:5.0f}% {:6.0f}% {:6.0f}%".format(*row) for name, row in rows),
    ]


# ---- a picture of some samples -------------------------------------------------------------------------------------

PICTURE = (470, 352)  # pixels for an image; its text stands below
TEXT_HEIGHT, LINE_HEIGHT, FONT_SIZE, GAP = 142, 18, 15, 14
LETTERS = 66  # that fit on a line
COLOURS = ("#e6194b", "#2f7fff", "#2ca02c", "#f58231", "#a030c0", "#009999")


def draw_samples(samples: Sequence[Sample], path: str | Path, count: int = 8) -> None:
    """Writes a PNG of samples spread over the data, each with its boxes, question and answer."""
    count = min(count, len(samples))
    columns, rows = min(4, count), (count + 3) // 4
    width, height = PICTURE[0] + GAP, PICTURE[1] + TEXT_HEIGHT + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    for number in range(count):
        tile = _tile(samples[number * len(samples) // count])
        sheet.paste(tile, (GAP + number % columns * width, GAP + number // columns * height))
    sheet.save(path, "PNG")


def _tile(sample: Sample) -> Image.Image:
    """One sample of the sheet."""
    tile = Image.new("RGB", (PICTURE[0], PICTURE[1] + TEXT_HEIGHT), "white")
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(FONT_SIZE)
    draw.rectangle((0, 0, *PICTURE), fill="#e8e8e8")
    about, problem = Path(sample.source).name, "no image"
    if sample.images:
        try:
            image = load_image(sample.images[0], sample.root)
        except BadSample as error:
            problem = str(error)
        else:
            picture, problem = _with_boxes(image, sample), ""
            tile.paste(picture, ((PICTURE[0] - picture.width) // 2, (PICTURE[1] - picture.height) // 2))
            about += f"   {image.width} x {image.height}"
    if len(sample.images) > 1:
        about += f"   image 1 of {len(sample.images)}"
    draw.text((10, 10), "\n".join(textwrap.wrap(problem, LETTERS)), fill="#666666", font=font)
    question = sample.question.replace(IMAGE_MARK, " ").strip()
    lines = [(about, "#888888")]
    lines += [(line, "black") for line in textwrap.wrap(question, LETTERS, max_lines=4, placeholder=" ...")]
    answer = textwrap.wrap(unfence(sample.answer), LETTERS, max_lines=2, placeholder=" ...")
    lines += [(line, "#0050b0") for line in answer]
    for number, (line, colour) in enumerate(lines):
        draw.text((0, PICTURE[1] + 6 + number * LINE_HEIGHT), line, fill=colour, font=font)
    return tile


def _with_boxes(image: Image.Image, sample: Sample) -> Image.Image:
    """The image in the size of a tile with the sample's boxes and their labels."""
    scale = min(PICTURE[0] / image.width, PICTURE[1] / image.height)
    picture = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    if not sample.has_boxes:
        return picture
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    value = json.loads(unfence(sample.answer))
    items = value if isinstance(value, list) else [value]
    labels = [item.get("label", "") for item in items if isinstance(item, dict)] or [""]
    for number, (box, label) in enumerate(zip(answer_boxes(sample.answer), labels, strict=True)):
        corners, colour = [side * scale for side in box], COLOURS[number % len(COLOURS)]
        label = " ".join(str(label).encode(errors="replace").decode().split())[:40]  # one line that can be drawn
        left = min(corners[0] + 6, picture.width - draw.textlength(label, font) - 4)
        draw.rectangle(corners, outline="white", width=5)
        draw.rectangle(corners, outline=colour, width=3)
        draw.text((left, corners[1] + 4), label, fill="white", font=font, stroke_width=2, stroke_fill=colour)
    return picture
