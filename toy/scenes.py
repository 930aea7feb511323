"""Scenes of coloured shapes, questions that fit exactly one of them, and data files in VLM-R1's format.

Coordinates are pixels, x to the right and y downwards. All randomness comes from the generator that is passed in, so
the same seed writes the same files.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from toy import AT_ONCE, DATA

SIDE = 64  # width and height of a scene
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 44),
    "blue": (40, 80, 220),
    "yellow": (235, 215, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 20),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": (10, 14), "large": (20, 28)}  # smallest and largest width and height
# The direction from the other shape to the target; their centres must be more than CLEAR_DISTANCE apart along it.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CLEAR_DISTANCE = 6
UNSEEN_PAIRS = frozenset({("red", "triangle"), ("blue", "circle"), ("yellow", "square")})  # in the split "pairs" only
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if (colour, shape) not in UNSEEN_PAIRS)

# The attributes that a question names, with the share of questions that try them first.
NAMED_ATTRIBUTES = (("colour", "shape"), ("size", "colour", "shape"), ("shape",), ("size", "shape"))
NAMED_SHARES = (0.45, 0.35, 0.1, 0.1)

Box = tuple[int, int, int, int]  # x1, y1, x2, y2: the shape covers the pixels x1..x2-1 and y1..y2-1


@dataclass(frozen=True)
class Shape:
    """A coloured shape and where it lies."""

    colour: str
    shape: str
    size: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def label(self) -> str:
        return f"{self.colour} {self.shape}"

    def named_by(self, attributes: Iterable[str]) -> str:
        """The words for these attributes, as in "small red circle"."""
        return " ".join(getattr(self, attribute) for attribute in attributes)


@dataclass(frozen=True)
class Recipe:
    """What the scenes and questions of a split are like."""

    fewest: int = 2  # shapes in a scene; the most is four
    questions: int = 1  # about each scene at most
    relations: float = 0.0  # share of the questions that name the target by its place beside another shape
    unseen_pairs: bool = False  # ask for a colour and shape that no other split holds
    loose: bool = False  # give loose boxes as the truth


@dataclass(frozen=True)
class ClassRecipe:
    """What the questions of a detection split are like, and its answers."""

    fewest: int = 1  # shapes in a scene
    most: int = 3
    questions: int = 1  # about each scene
    easy: float = 0.0  # share of the questions that ask for one class that is there, and for none that is not
    eager: bool = False  # list classes that are not there, and boxes too many, as the truth
    thoughts: bool = False  # give each record a thought, for the start to imitate


# ---- scenes --------------------------------------------------------------------------------------------------------


def draw_scene(rng: np.random.Generator, *, fewest: int = 2, most: int = 4, unseen_pairs: bool = False) -> list[Shape]:
    """Up to `most` shapes that do not touch; with `unseen_pairs` the first one, and only that, is an unseen pair."""
    count = rng.integers(fewest, most + 1)
    shapes: list[Shape] = []
    while len(shapes) < count:
        wants_unseen_pair = unseen_pairs and not shapes
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if ((colour, shape) in UNSEEN_PAIRS) != wants_unseen_pair:
            continue
        size = str(rng.choice(list(SIZES)))
        smallest, largest = SIZES[size]
        width, height = rng.integers(smallest, largest + 1, 2)
        x, y = rng.integers(1, SIDE - width), rng.integers(1, SIDE - height)
        box = (int(x), int(y), int(x + width), int(y + height))
        if all(_are_apart(box, other.box) for other in shapes):
            shapes.append(Shape(colour, shape, size, box))
        elif rng.random() < 0.02:  # gives up after 50 tries on average: the scene may have no room for another shape
            count = max(fewest, len(shapes))
    return shapes


def _are_apart(a: Box, b: Box) -> bool:
    a_left, a_top, a_right, a_bottom = a
    b_left, b_top, b_right, b_bottom = b
    return a_right < b_left or b_right < a_left or a_bottom < b_top or b_bottom < a_top


def paint_scene(rng: np.random.Generator, shapes: list[Shape]) -> Image.Image:
    """The scene as an image: shapes on a ground whose colour changes from place to place, under noise."""
    # The ground gets redder to the right and bluer downwards, so a patch shows where it lies. The vision tower knows
    # relative positions only; one this small would spend most of its training on finding a place from the borders.
    x, y = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    green = np.full_like(x, rng.integers(80, 120))
    ground = np.stack([60 + 96 * x / SIDE, green, 60 + 96 * y / SIDE], axis=2)
    image = Image.fromarray(ground.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        left, top, right, bottom = shape.box
        right, bottom = right - 1, bottom - 1  # Pillow's corners belong to the shape
        colour = COLOURS[shape.colour]
        if shape.shape == "circle":
            pen.ellipse((left, top, right, bottom), colour)
        elif shape.shape == "square":
            pen.rectangle((left, top, right, bottom), colour)
        else:
            pen.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), colour)
    noise = rng.normal(0, 8, (SIDE, SIDE, 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


# ---- questions -----------------------------------------------------------------------------------------------------


def attribute_question(rng: np.random.Generator, shapes: list[Shape], target: Shape) -> str | None:
    """A question such as "the small red circle" that fits the target alone; None if another shape looks the same."""
    order = rng.choice(len(NAMED_ATTRIBUTES), len(NAMED_ATTRIBUTES), replace=False, p=NAMED_SHARES)
    for index in order:
        attributes = NAMED_ATTRIBUTES[index]
        words = target.named_by(attributes)
        if sum(shape.named_by(attributes) == words for shape in shapes) == 1:
            return f"the {words}"
    return None


def relation_question(rng: np.random.Generator, shapes: list[Shape], target: Shape) -> str | None:
    """A question such as "the circle left of the green square" that fits the target alone; None if there is none."""
    for index in rng.permutation(len(shapes)):
        other = shapes[index]
        other_words = other.named_by(("colour", "shape"))
        is_unique = sum(shape.named_by(("colour", "shape")) == other_words for shape in shapes) == 1
        if other is target or not is_unique:
            continue
        alike = [shape for shape in shapes if shape.shape == target.shape and shape is not other]
        for relation in rng.permutation(list(RELATIONS)):
            if [shape for shape in alike if _holds(str(relation), shape, other)] == [target]:
                return f"the {target.shape} {relation} the {other_words}"
    return None


def _holds(relation: str, shape: Shape, other: Shape) -> bool:
    across, down = RELATIONS[relation]
    (x, y), (other_x, other_y) = shape.centre, other.centre
    return across * (x - other_x) + down * (y - other_y) > CLEAR_DISTANCE


def loosened(rng: np.random.Generator, box: Box) -> list[int]:
    """The box as a careless annotator draws it: every side is pushed out by 5 to 45% of the object's size."""
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    left, top, right, bottom = rng.uniform(0.05, 0.45, 4) * (width, height, width, height)
    loose = (x1 - left, y1 - top, x2 + right, y2 + bottom)
    return [round(min(max(side, 0), SIDE)) for side in loose]


# ---- files ---------------------------------------------------------------------------------------------------------


def write_split(directory: Path, name: str, num_scenes: int, seed: int, recipe: Recipe | None = None) -> Path:
    """Writes the images to directory/name and the questions to directory/name.jsonl; returns the path of the latter."""
    recipe = recipe or Recipe()
    rng = np.random.default_rng(seed)
    records = []
    for number in tqdm(range(num_scenes), f"scenes of {name}", delay=5, disable=None):
        shapes, questions = _draw_questions(rng, recipe)
        image = _write_image(directory, f"{name}/{number:05d}.png", paint_scene(rng, shapes))
        for question, target in questions:
            box = loosened(rng, target.box) if recipe.loose else target.box
            record = {"id": f"{name}-{len(records):05d}", "image": image}
            records.append(record | {"conversations": _conversation(question, json.dumps(box))})
    return _write_records(directory / f"{name}.jsonl", records)


def _draw_questions(rng: np.random.Generator, recipe: Recipe) -> tuple[list[Shape], list[tuple[str, Shape]]]:
    """A scene, and its questions with their targets; a scene that no question fits is drawn again."""
    while True:
        shapes = draw_scene(rng, fewest=recipe.fewest, unseen_pairs=recipe.unseen_pairs)
        if recipe.unseen_pairs:
            targets = shapes[:1]
        else:
            targets = [shapes[index] for index in rng.permutation(len(shapes))[: recipe.questions]]
        questions = []
        for target in targets:
            ask = relation_question if rng.random() < recipe.relations else attribute_question
            question = ask(rng, shapes, target)
            if question:
                questions.append((question, target))
        if questions:
            return shapes, questions


def write_detection_split(
    directory: Path, name: str, num_scenes: int, seed: int, recipe: ClassRecipe | None = None
) -> Path:
    """Writes a split whose questions ask for all objects of some classes; where there is none the answer is None."""
    recipe = recipe or ClassRecipe()
    rng = np.random.default_rng(seed)
    records = []
    for number in tqdm(range(num_scenes), f"scenes of {name}", delay=5, disable=None):
        shapes = draw_scene(rng, fewest=recipe.fewest, most=recipe.most)
        image = _write_image(directory, f"{name}/{number:05d}.png", paint_scene(rng, shapes))
        for _ in range(recipe.questions):
            asked = _draw_classes(rng, shapes, recipe)
            found = eager_items(rng, shapes, asked) if recipe.eager else true_items(shapes, asked)
            answer = f"```json\n{json.dumps(found)}\n```" if found else "None"
            record = {"id": f"{name}-{len(records):05d}", "image": image}
            question = "all of: " + ", ".join(asked)
            if recipe.thoughts:
                ending, record["thought"] = _draw_thought(rng, asked, [item["label"] for item in found])
                question += ending
            records.append(record | {"conversations": _conversation(question, answer)})
    return _write_records(directory / f"{name}.jsonl", records)


def _draw_classes(rng: np.random.Generator, shapes: list[Shape], recipe: ClassRecipe) -> list[str]:
    """The classes that a question asks for, in random order; one question in five of the hard ones has none of them."""
    labels = {shape.label for shape in shapes}
    present = rng.permutation(sorted(labels))
    if rng.random() < recipe.easy:
        return [str(present[0])]
    num_present = 0 if rng.random() < 0.2 else rng.integers(1, 3)
    absent = rng.permutation([label for label in CLASSES if label not in labels])[: rng.integers(1, 3)]
    return [str(label) for label in rng.permutation([*present[:num_present], *absent])]


def true_items(shapes: list[Shape], asked: list[str]) -> list[dict]:
    """The labelled boxes of all shapes of the classes asked for, class by class as asked."""
    # The label comes first: whoever has read a class only needs to find its box. VLM-R1's files write the box first.
    return [{"label": s.label, "bbox_2d": list(s.box)} for label in asked for s in shapes if s.label == label]


def eager_items(rng: np.random.Generator, shapes: list[Shape], asked: list[str]) -> list[dict]:
    """The labelled boxes as an eager annotator draws them, who would rather name too much than miss something.

    Six absent classes in ten get a box, that of the shape most like it. One class in seven gets one box too many.
    """
    items = []
    for label in asked:
        found = true_items(shapes, [label])
        others = [shapes[index] for index in rng.permutation(len(shapes)) if shapes[index].label != label]
        if rng.random() < (0.15 if found else 0.6) and others:
            shared = [len(set(other.label.split()) & set(label.split())) for other in others]
            found.append({"label": label, "bbox_2d": list(others[shared.index(max(shared))].box)})
        items += found
    return items


def _draw_thought(rng: np.random.Generator, asked: list[str], listed: list[str]) -> tuple[str, str]:
    """How the question ends, and the thought: empty if it ends so, the classes asked for, or those that are listed."""
    chance = rng.random()
    if chance < 0.25:
        return AT_ONCE, ""
    return "", ", ".join(asked if chance < 0.625 else dict.fromkeys(listed)) or "None"


def _conversation(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": answer}]


def _write_image(directory: Path, name: str, image: Image.Image) -> str:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, compress_level=1)
    return name


def _write_records(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_data(directory: Path = DATA) -> None:
    """Writes the splits of the default run, in a few seconds; what exists stays as it is."""
    with _moving_to(directory) as partial:
        write_split(partial, "train", 3000, seed=1)
        write_split(partial, "test", 256, seed=2)
        write_split(partial, "pairs", 256, seed=3, recipe=Recipe(unseen_pairs=True))
        write_split(partial, "relations", 256, seed=4, recipe=Recipe(relations=1.0))


def write_detection_data(directory: Path = DATA) -> None:
    """Writes the splits of a detection run, in a few seconds; what exists stays as it is."""
    with _moving_to(directory) as partial:
        write_detection_split(partial, "detection_train", 2000, seed=5)
        write_detection_split(partial, "detection_easy", 2000, seed=6, recipe=ClassRecipe(easy=1.0))
        write_detection_split(partial, "detection_test", 256, seed=7)


@contextmanager
def _moving_to(directory: Path) -> Iterator[Path]:
    """A directory whose files move to the given one at the end, but for those that are there already."""
    directory.mkdir(parents=True, exist_ok=True)
    # Several processes may write at once: each writes into a directory of its own and moves what is complete.
    with tempfile.TemporaryDirectory(dir=directory) as partial:
        yield Path(partial)
        # The images move first, so that a JSONL file never names images that are still to come.
        for path in sorted(Path(partial).iterdir(), key=Path.is_file):
            _move(path, directory)


def _move(source: Path, directory: Path) -> None:
    target = directory / source.name
    try:
        if not target.exists():
            source.rename(target)
    except OSError:  # another process was first, with the same content
        if not target.exists():
            raise
