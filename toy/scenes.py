"""Scenes of coloured shapes, questions that mean exactly one of them, and data files in VLM-R1's format."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from toy import DATA

SIDE = 64  # pixels of a scene, both ways
COLOURS = {"red": (214, 40, 40), "green": (44, 160, 44), "blue": (40, 80, 220), "yellow": (235, 215, 40),
           "purple": (150, 60, 190), "orange": (245, 140, 20)}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": (10, 14), "large": (20, 28)}  # pixels a side
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
UNSEEN_PAIRS = frozenset({("red", "triangle"), ("blue", "circle"), ("yellow", "square")})  # kept for the split "pairs"


@dataclass(frozen=True)
class Shape:
    colour: str
    shape: str
    size: str
    box: tuple[int, int, int, int]  # x1, y1, x2, y2: the pixels drawn are x1..x2-1

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def draw_scene(rng: np.random.Generator, *, fewest: int = 2, unseen_pairs: bool = False) -> list[Shape]:
    """Up to four shapes that do not touch; with `unseen_pairs` the first has a colour and shape never trained on."""
    count, shapes = rng.integers(fewest, 5), []
    while len(shapes) < count:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        if ((colour, shape) in UNSEEN_PAIRS) != (unseen_pairs and not shapes):
            continue
        size = rng.choice(list(SIZES))
        width, height = rng.integers(SIZES[size][0], SIZES[size][1] + 1, 2)
        x, y = rng.integers(1, SIDE - width), rng.integers(1, SIDE - height)
        box = (int(x), int(y), int(x + width), int(y + height))
        if all(_apart(box, other.box) for other in shapes):
            shapes.append(Shape(str(colour), str(shape), str(size), box))
        elif rng.random() < 0.02:  # the scene may be too full for one more
            count = max(fewest, len(shapes))
    return shapes


def _apart(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def paint_scene(rng: np.random.Generator, shapes: list[Shape]) -> Image.Image:
    """The scene as an image: shapes on a ground lit from the upper left, noise over all of it."""
    # The light tells where a patch lies: redder to the right, bluer downwards. A tower this small, with nothing but
    # relative positions, would otherwise spend most of its training on learning to read a place off its borders.
    x, y = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    ground = np.stack([60 + 1.5 * x, np.full_like(x, rng.integers(80, 120)), 60 + 1.5 * y], 2)
    image = Image.fromarray(ground.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        x1, y1, x2, y2 = shape.box[0], shape.box[1], shape.box[2] - 1, shape.box[3] - 1  # PIL's corners are inclusive
        if shape.shape == "circle":
            pen.ellipse((x1, y1, x2, y2), COLOURS[shape.colour])
        elif shape.shape == "square":
            pen.rectangle((x1, y1, x2, y2), COLOURS[shape.colour])
        else:
            pen.polygon(((x1, y2), (x2, y2), ((x1 + x2) // 2, y1)), COLOURS[shape.colour])
    noise = rng.normal(0, 8, (SIDE, SIDE, 1))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def attribute_question(rng: np.random.Generator, shapes: list[Shape], target: Shape) -> str | None:
    """Words that mean the target alone: its shape, mostly its colour, often its size; None if two look alike."""
    forms = [(True, False), (True, True), (False, False), (False, True)]  # colour named, size named
    for index in rng.choice(len(forms), len(forms), replace=False, p=[0.45, 0.35, 0.1, 0.1]):
        colour, size = forms[index]
        alike = [
            other
            for other in shapes
            if other.shape == target.shape
            and (not colour or other.colour == target.colour)
            and (not size or other.size == target.size)
        ]
        if len(alike) == 1:
            return " ".join(["the", *[target.size] * size, *[target.colour] * colour, target.shape])
    return None


def relation_question(rng: np.random.Generator, shapes: list[Shape], target: Shape) -> str | None:
    """The target by its place beside another shape, as in "the circle left of the green square"; None if ambiguous."""
    for index in rng.permutation(len(shapes)):
        other = shapes[index]
        if other is target or sum((s.colour, s.shape) == (other.colour, other.shape) for s in shapes) > 1:
            continue
        for name in rng.permutation(list(RELATIONS)):
            there = [s for s in shapes if s is not other and s.shape == target.shape and _stands(s, str(name), other)]
            if there == [target]:
                return f"the {target.shape} {name} the {other.colour} {other.shape}"
    return None


def _stands(a: Shape, relation: str, b: Shape) -> bool:
    across, down = RELATIONS[relation]
    return across * (a.centre[0] - b.centre[0]) + down * (a.centre[1] - b.centre[1]) > 6


def loosened(rng: np.random.Generator, box: tuple[int, ...]) -> list[int]:
    """The box as a careless annotator draws it: every side pushed out by 5 to 45% of the object's size."""
    width, height = box[2] - box[0], box[3] - box[1]
    out = rng.uniform(0.05, 0.45, 4) * (width, height, width, height)
    x1, y1, x2, y2 = box[0] - out[0], box[1] - out[1], box[2] + out[2], box[3] + out[3]
    return [round(max(0, x1)), round(max(0, y1)), round(min(SIDE, x2)), round(min(SIDE, y2))]


def write_split(
    directory: Path,
    name: str,
    num_scenes: int,
    seed: int,
    *,
    relations: float = 0.0,
    unseen_pairs: bool = False,
    loose: bool = False,
    fewest: int = 2,
    questions: int = 1,
) -> Path:
    """Images and a JSONL of VLM-R1's format; `relations` is the share of questions by relation."""
    rng = np.random.default_rng(seed)
    (directory / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for number in tqdm(range(num_scenes), f"scenes of {name}", delay=5):
        asked = []
        while not asked:
            shapes = draw_scene(rng, fewest=fewest, unseen_pairs=unseen_pairs)
            targets = shapes[:1] if unseen_pairs else [shapes[i] for i in rng.permutation(len(shapes))[:questions]]
            for target in targets:
                ask = relation_question if rng.random() < relations else attribute_question
                asked.append((ask(rng, shapes, target), target))
            asked = [(text, target) for text, target in asked if text]
        image = f"{name}/{number:05d}.png"
        paint_scene(rng, shapes).save(directory / image, compress_level=1)
        for text, target in asked:
            box = loosened(rng, target.box) if loose else list(target.box)
            turns = [{"from": "human", "value": f"<image>{text}"}, {"from": "gpt", "value": json.dumps(box)}]
            lines.append(json.dumps({"id": f"{name}-{len(lines):05d}", "image": image, "conversations": turns}))
    path = directory / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_detection_split(directory: Path, name: str, num_scenes: int, seed: int, *, absent: int = 1) -> Path:
    """Images and a JSONL that asks for every object of one or two classes in the scene and of `absent` that are not.

    One question in five asks for absent classes alone, so that its answer is None.
    """
    rng = np.random.default_rng(seed)
    (directory / name).mkdir(parents=True, exist_ok=True)
    classes = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    lines = []
    for number in range(num_scenes):
        shapes = draw_scene(rng)
        present = sorted({f"{s.colour} {s.shape}" for s in shapes})
        chosen = [str(c) for c in rng.permutation(present)[: 0 if rng.random() < 0.2 else rng.integers(1, 3)]]
        missing = [str(c) for c in rng.permutation([c for c in classes if c not in present])[:absent]]
        asked = [str(c) for c in rng.permutation(chosen + missing)]
        found = [{"bbox_2d": list(s.box), "label": f"{s.colour} {s.shape}"} for s in shapes]
        found = [item for item in found if item["label"] in asked]
        image = f"{name}/{number:05d}.png"
        paint_scene(rng, shapes).save(directory / image, compress_level=1)
        turns = [
            {"from": "human", "value": "<image>all of: " + ", ".join(asked)},
            {"from": "gpt", "value": f"```json\n{json.dumps(found)}\n```" if found else "None"},
        ]
        record = {
            "id": f"{name}-{number:05d}",
            "image": image,
            "conversations": turns,
            "accu_reward_method": "odLength",
        }
        lines.append(json.dumps(record))
    path = directory / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_data(directory: Path = DATA) -> None:
    """The splits of the default run, a few seconds; what is there already is left alone."""
    if directory.exists():
        return
    partial = directory.with_name(f"{directory.name}.{os.getpid()}")  # other processes may be writing the same
    write_split(partial, "train", 3000, seed=1)
    write_split(partial, "test", 256, seed=2)
    write_split(partial, "pairs", 256, seed=3, unseen_pairs=True)
    write_split(partial, "relations", 256, seed=4, relations=1.0)
    try:
        partial.rename(directory)
    except OSError:  # another process was first; the files are the same
        shutil.rmtree(partial)
