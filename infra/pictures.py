"""Draws with Pillow what a model answers: boxes on an image, and a group of completions with its text."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from data import IMAGE_MARK, load_image
from infra.report_data import is_listed, read_marks, rewards_of
from infra.report_page import Mark, advantage_colour

LEAST_SIDE, MOST_SIDE = 512, 1024  # pixels of a picture's longer side: a smaller image is enlarged, a larger one shrunk
TRUE = "#1fa34a"  # the colour of a true box
LINE_HEIGHT, FONT_SIZE = 18, 14  # of a text below an image


def draw_marks(image: Image.Image, marks: Sequence[tuple[str, Mark]], most: int = 0) -> Image.Image:
    """The image with (colour, mark) each drawn on it, its longer side at most `most` pixels if that is given."""
    longer = max(image.size)
    scale = max(1, round(LEAST_SIDE / longer))
    if 0 < most < longer:
        scale = most / longer
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    picture = image.resize([max(1, round(side * scale)) for side in image.size], how)
    pen, width = ImageDraw.Draw(picture), max(3, max(picture.size) // 200)
    font = ImageFont.load_default(max(14, max(picture.size) // 45))
    for colour, mark in marks:
        x1, y1, x2, y2 = (side * scale for side in mark.box)
        corners = [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]
        if mark.box[:2] == mark.box[2:]:  # a point
            corners = [x1 - 3 * width, y1 - 3 * width, x1 + 3 * width, y1 + 3 * width]
        around = [corner + edge for corner, edge in zip(corners, (-1, -1, 1, 1), strict=True)]
        pen.rectangle(around, None, "black", width + 2)
        pen.rectangle(corners, None, colour, width)
        place = (corners[0] + 2 * width, corners[1] + width)
        pen.text(place, _drawable(mark.label), "white", font, stroke_width=2, stroke_fill=colour)
    return picture


def draw_group(group: dict) -> Image.Image:
    """A line of completions.jsonl as a picture: the true box in green, the others coloured by their advantage.

    Numbers tie a box to its completion below. Raises BadSample if the image cannot be read.
    """
    rows, rewards, truth = group["group"], rewards_of(group), str(group["answer"])
    listed = is_listed(truth)
    true, marks, lines = read_marks(truth, group, listed=listed), [], []
    lines = [(group["question"].replace(IMAGE_MARK, " ").strip(), "black"), (f"true answer: {truth}", TRUE)]
    for place in sorted(range(len(rows)), key=lambda place: rows[place]["advantage"] or 0.0):  # the best lies on top
        advantage, text = rows[place]["advantage"] or 0.0, str(rows[place]["completion"])
        colour = advantage_colour(advantage)
        if true or listed:
            found = read_marks(text, group, listed=listed)
            marks += [(colour, Mark(mark.box, f"{place + 1} {mark.label}".strip())) for mark in found]
        lines.insert(2, (f"{place + 1}  {advantage:+.2f}  reward {rewards[place]:.3g}  {text}", colour))
    marks += [(TRUE, mark) for mark in true]
    image = load_image(group["images"][0]) if group["images"] else Image.new("RGB", (LEAST_SIDE, 1), "white")
    return _with_text(draw_marks(image, marks, most=MOST_SIDE), lines)


def _with_text(picture: Image.Image, lines: Sequence[tuple[str, str]]) -> Image.Image:
    """The picture with these (text, colour) below it, three lines of each at most."""
    letters = max(30, picture.width // 8)
    cut = [
        (line, colour)
        for text, colour in lines
        for line in textwrap.wrap(_drawable(text), letters, max_lines=3, placeholder=" ...")
    ]
    sheet = Image.new("RGB", (picture.width, picture.height + LINE_HEIGHT * len(cut) + 12), "white")
    sheet.paste(picture, (0, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, (line, colour) in enumerate(cut):
        pen.text((6, picture.height + 6 + LINE_HEIGHT * number), line, fill=colour, font=font)
    return sheet


def _drawable(text: str) -> str:
    """The text on one line, without what Pillow cannot write."""
    return " ".join(text.encode(errors="replace").decode().split())
