"""infra/pictures.py: boxes where they belong, in the right colours, on an image of a readable size."""

import numpy as np
import pytest
from PIL import Image

from data import BadSample
from infra.pictures import draw_group, draw_marks
from infra.report_page import Mark, advantage_colour

PLACE = {"image_size": [64, 64], "input_size": [128, 128], "family": "qwen2_5_vl", "box_space": ""}


def has_colour(picture, colour, corner):
    """Whether the colour stands within three pixels of that corner."""
    x, y = corner
    near = np.asarray(picture)[y - 3 : y + 4, x - 3 : x + 4].reshape(-1, 3)
    return (near == [int(colour[place : place + 2], 16) for place in (1, 3, 5)]).all(1).any()


def test_marks_are_drawn_in_pixels_of_the_enlarged_or_shrunk_image():
    small = draw_marks(Image.new("RGB", (64, 32), "white"), [("#ff0000", Mark([8, 4, 24, 20], ""))])
    assert small.size == (512, 256)
    assert has_colour(small, "#ff0000", (64, 32)) and has_colour(small, "#ff0000", (192, 160))
    large = draw_marks(
        Image.new("RGB", (4000, 1000), "white"), [("#ff0000", Mark([400, 40, 2000, 800], ""))], most=1000
    )
    assert large.size == (1000, 250)
    assert has_colour(large, "#ff0000", (100, 10)) and has_colour(large, "#ff0000", (500, 200))


def group_of(path, texts, advantages, answer="[20, 40, 60, 100]", question="the <image>cat"):
    rows = [
        {"completion": text, "rewards": {"iou": 0.5}, "reward": 0.5, "advantage": advantage}
        for text, advantage in zip(texts, advantages, strict=True)
    ]
    return {**PLACE, "id": "a", "images": [path] if path else [], "question": question, "answer": answer, "group": rows}


def test_a_group_shows_the_true_box_over_the_others_in_the_colours_of_their_advantages(tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "image.png")
    texts = ["[20, 40, 60, 100]", "[80, 80, 120, 120]", "nothing", "\ud800[80, 80, 90, 120] \x00"]
    picture = draw_group(group_of(str(tmp_path / "image.png"), texts, [1.0, -1.0, None, -0.5]))
    # 128 pixels of the model's input are 64 of the image and 512 of the picture
    assert has_colour(picture, "#1fa34a", (240, 160)) and not has_colour(picture, advantage_colour(1.0), (240, 160))
    assert has_colour(picture, advantage_colour(-1.0), (480, 480))
    assert picture.width == 512 and picture.height > 512 + 6 * 18  # a question, a truth and four completions


def test_a_group_without_boxes_or_without_an_image_shows_its_text(tmp_path):
    picture = draw_group(group_of("", ["12", "13 " * 2000], [1.0, -1.0], answer="12", question="how many? " * 200))
    assert picture.width == 512 and 18 * 8 <= picture.height <= 8 + 18 * 12 + 12
    with pytest.raises(BadSample):
        draw_group(group_of(str(tmp_path / "gone.png"), ["12"], [1.0]))
