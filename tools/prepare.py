"""Turns COCO-style annotations (COCO, LVIS, D3) into detection training data in VLM-R1's format.

    python -m tools.prepare coco annotations.json --out ovd.jsonl

A prompt asks for a few classes that an image holds, mixed with classes that it lacks. Some prompts ask for absent
classes alone, and their answer is "None".
- A class is asked for only if the file marks every object of it. A crowd among its marks, or an entry in LVIS's
  not_exhaustive_category_ids, means that some objects are not marked.
- A class counts as absent only if the image has no mark of it. If LVIS gives the image neg_category_ids, the class
  must be one of them too.

The annotation file is loaded as a whole and checked before the first line is written.
Left out: images without a box of an askable class, masks, synonyms, absent classes chosen because they are hard.
"""

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from data import IMAGE_MARK

USAGE = """\
usage: python -m tools.prepare coco ANNOTATIONS.json [--out ovd.jsonl] [--image_prefix DIR] [more options]

Turns COCO-style annotations (COCO, LVIS, D3) into detection training data. For example:

  python -m tools.prepare coco annotations/instances_train2017.json --out ovd.jsonl \\
      --image_prefix train2017 --skip_empty_boxes

--help lists all options."""

# The question of VLM-R1's paper (arXiv 2504.07615, 5.1). The targets are a JSON list because captions hold commas.
QUESTION = (
    "Please carefully check the image and detect the following objects: {targets}. Output each detected target's bbox "
    'coordinates in JSON format. The format of the bbox coordinates is: ```json [{"bbox_2d": [x1, y1, x2, y2], '
    '"label": "target name"}, ...] ```. If there are no such targets in the image, simply respond with None.'
)
KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}
RESERVED = (IMAGE_MARK, "```", "<answer>", "</answer>")  # data.py and the rewards cut a text at these
MAX_COORDINATE = 1e9  # no image is that large; the bound also refuses NaN and infinity
Id = int | str
Box = list[float]


@dataclass(frozen=True)
class Config:
    out: str = HfArg(default="ovd.jsonl", help="file to write; an existing one is replaced when all lines are written")
    negatives: int = HfArg(default=2, help="absent classes in each prompt, if the image has that many")
    none_share: float = HfArg(default=0.1, help="expected share of prompts for absent classes alone, below 1")
    max_classes: int = HfArg(
        default=4, help="most present classes in a prompt; an image with more gets several prompts"
    )
    min_size: float = HfArg(default=0.0, help="drop boxes with a side shorter than this many pixels")
    max_boxes: int = HfArg(default=30, help="leave out prompts whose answer would hold more boxes than this")
    skip_empty_boxes: bool = HfArg(
        default=False, help="drop boxes without area instead of refusing the file; COCO train2017 has two"
    )
    seed: int = HfArg(default=0, help="seed of everything that is drawn")
    image_prefix: str = HfArg(default="", help="directory to put before every image name")

    def __post_init__(self) -> None:
        for name, least in {"negatives": 0, "max_classes": 1, "min_size": 0, "max_boxes": 1, "seed": 0}.items():
            if not getattr(self, name) >= least:  # in this form it refuses NaN too
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if not 0 <= self.none_share < 1:
            raise ValueError(f"none_share is {self.none_share}: it must be at least 0 and below 1")
        if Path(self.out).is_dir() or not Path(self.out).parent.is_dir():
            raise ValueError(f"out is {self.out!r}: give the name of a file in a directory that exists")


@dataclass(frozen=True)
class Mark:
    """An annotation: what the file marks in an image."""

    category: Id
    box: Box | None  # None if it has no area
    is_crowd: bool


@dataclass(frozen=True)
class Annotations:
    """A COCO-style file after its checks."""

    names: dict[Id, str]  # by category id
    images: dict[Id, dict]  # by image id, as in the file
    marks: dict[Id, list[Mark]]  # by image id


# ---- reading and checking the file ---------------------------------------------------------------------------------


def read_annotations(path: Path, *, skip_empty_boxes: bool = False, progress: bool = False) -> Annotations:
    """The categories, images and marks of a COCO-style file, each in the order of its ids; a broken file is refused."""
    if not path.is_file():
        raise ValueError(f"{path}: no such annotation file; give the path of a COCO-style .json file")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # a ValueError is also text that is not UTF-8 or too long a number
        raise ValueError(f"{path}: not JSON: {error}; a COCO-style file holds one JSON object") from error
    categories, images, annotations = (_records_by_id(value, kind, path) for kind in KEYS)
    names = _category_names(categories, path)
    for number, image in images.items():
        _check_image(image, names, f"{path}: image {number!r}")
    marks: dict[Id, list[Mark]] = {number: [] for number in images}
    for number, annotation in tqdm(annotations.items(), "annotations", delay=5, disable=not progress):
        source = f"{path}: annotation {number!r}"
        for key, known in (("image_id", images), ("category_id", names)):
            if not _is_id_of(known, annotation[key]):
                raise ValueError(
                    f"{source}: {key} {annotation[key]!r} is unknown; add that entry or drop the annotation"
                )
        mark = _read_mark(annotation, images[annotation["image_id"]], source)
        if mark.box is None and not skip_empty_boxes:
            raise ValueError(f"{source}: bbox {annotation['bbox']} has no area; correct it, or add --skip_empty_boxes")
        marks[annotation["image_id"]].append(mark)
    return Annotations(names, images, marks)


def _records_by_id(value: object, kind: str, path: Path) -> dict[Id, dict]:
    records = value.get(kind) if isinstance(value, dict) else None
    if not isinstance(records, list) or not records:
        raise ValueError(
            f'{path}: no list "{kind}", or an empty one; a COCO-style file is one JSON object of {", ".join(KEYS)}'
        )
    by_id = {}
    for place, record in enumerate(records):
        number = record.get("id") if isinstance(record, dict) else None
        if type(number) not in (int, str):
            raise ValueError(f"{path}: {kind}[{place}]: id is {number!r}; it must be a whole number or a text")
        missing = [key for key in KEYS[kind] if key not in record]
        if missing:
            raise ValueError(f"{path}: {kind} id {number!r}: no {', '.join(missing)}; add it or drop the entry")
        if number in by_id:
            raise ValueError(f"{path}: {kind} id {number!r} is used twice; give each entry its own id")
        by_id[number] = record
    order = sorted(by_id, key=lambda number: (isinstance(number, str), number))  # a number does not compare with a text
    return {number: by_id[number] for number in order}


def _is_id_of(known: dict[Id, object], value: object) -> bool:
    return type(value) in (int, str) and value in known


def _category_names(categories: dict[Id, dict], path: Path) -> dict[Id, str]:
    owners: dict[str, Id] = {}
    for number, category in categories.items():
        name, source = category["name"], f"{path}: category {number!r}"
        if not isinstance(name, str) or not name.strip() or any(mark in name for mark in RESERVED):
            raise ValueError(f"{source}: the name is {name!r}; it must be a text without {' '.join(RESERVED)}")
        if name.strip() in owners:
            raise ValueError(
                f"{source}: category {owners[name.strip()]!r} is named {name!r} too; merge the two or rename one"
            )
        owners[name.strip()] = number
    return {number: name for name, number in owners.items()}


def _check_image(image: dict, names: dict[Id, str], source: str) -> None:
    for key in ("width", "height"):
        if type(image[key]) is not int or image[key] <= 0:
            raise ValueError(f"{source}: {key} is {image[key]!r}; it must be a whole number of pixels above 0")
    name = image.get("file_name") or image.get("coco_url")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{source}: file_name is {name!r}; add the path of the image below the image root")
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        ids = image.get(key, [])
        if not isinstance(ids, list) or not all(_is_id_of(names, number) for number in ids):
            raise ValueError(f"{source}: {key} is {str(ids)[:80]}; it must be a list of category ids")


def _read_mark(annotation: dict, image: dict, source: str) -> Mark:
    crowd = annotation.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"{source}: iscrowd is {crowd!r}; it must be 0, 1 or absent")
    return Mark(annotation["category_id"], corner_box(annotation["bbox"], image, source), bool(crowd))


def corner_box(bbox: object, image: dict, source: str) -> Box | None:
    """[x1, y1, x2, y2] inside the image from COCO's [x, y, width, height]; None if it has no area."""
    is_list = isinstance(bbox, list) and len(bbox) == 4
    if not is_list or not all(type(side) in (int, float) and abs(side) < MAX_COORDINATE for side in bbox):
        raise ValueError(f"{source}: bbox is {str(bbox)[:80]}; it must be [x, y, width, height], four finite numbers")
    x, y, width, height = bbox
    x1, y1, x2, y2 = (round(side, 2) for side in (x, y, x + width, y + height))
    if x1 >= x2 or y1 >= y2:  # after rounding, which can make a thin box empty
        return None
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, image["width"]), min(y2, image["height"])
    if x1 >= x2 or y1 >= y2:
        size = f"{image['width']} x {image['height']}"
        raise ValueError(f"{source}: bbox {bbox} lies outside its image of {size} pixels; correct or drop it")
    return [x1, y1, x2, y2]


# ---- prompts -------------------------------------------------------------------------------------------------------


def image_classes(image: dict, annotations: Annotations, min_size: float) -> tuple[dict[str, list[Box]], list[str]]:
    """The boxes of each class that a prompt may ask for in this image, and the classes that are absent from it."""
    marks, names = annotations.marks[image["id"]], annotations.names
    incomplete = {*image.get("not_exhaustive_category_ids", []), *(mark.category for mark in marks if mark.is_crowd)}
    boxes: dict[Id, list[Box]] = {}
    for mark in marks:
        if mark.category not in incomplete and mark.box and _shorter_side(mark.box) >= min_size:
            boxes.setdefault(mark.category, []).append(mark.box)
    # A class whose boxes were dropped is in the image all the same, so it is not absent.
    absent = set(image.get("neg_category_ids", names)) - incomplete - {mark.category for mark in marks}
    present = {name: boxes[number] for number, name in names.items() if number in boxes}
    return present, [name for number, name in names.items() if number in absent]


def _shorter_side(box: Box) -> float:
    x1, y1, x2, y2 = box
    return min(x2 - x1, y2 - y1)


def draw_prompts(
    boxes: dict[str, list[Box]], absent: list[str], config: Config, rng: random.Random
) -> Iterator[tuple[list[str], dict[str, list[Box]]]]:
    """For each prompt about an image, the classes it asks for and the boxes of those that are present."""
    present = rng.sample(list(boxes), len(boxes))
    for start in range(0, len(present), config.max_classes):
        chosen = present[start : start + config.max_classes]
        if sum(len(boxes[name]) for name in chosen) > config.max_boxes:
            continue
        asked = chosen + rng.sample(absent, min(config.negatives, len(absent)))
        rng.shuffle(asked)
        yield asked, {name: boxes[name] for name in asked if name in boxes}
        # With a share s this adds s / (1 - s) prompts on average, which are a share s of all. They ask for as many
        # classes as the prompt before, if so many are absent: their number must not give the answer away.
        while absent and rng.random() < config.none_share:
            yield rng.sample(absent, min(len(asked), len(absent))), {}


def training_record(sample_id: str, image: str, asked: list[str], boxes: dict[str, list[Box]]) -> dict:
    """A line of VLM-R1's training file: a question for these classes, and as its answer the fenced boxes or "None"."""
    items = [{"bbox_2d": box, "label": name} for name in boxes for box in boxes[name]]
    question = IMAGE_MARK + QUESTION.replace("{targets}", json.dumps(asked, ensure_ascii=False))
    answer = f"```json\n{json.dumps(items, ensure_ascii=False)}\n```" if items else "None"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": sample_id, "image": image, "conversations": turns, "accu_reward_method": "odLength"}


def image_path(image: dict, prefix: str) -> str:
    """The path of an image below the image root: the prefix and its file_name, or the end of LVIS v1's coco_url."""
    name = image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:])  # train2017/000000391895.jpg
    return str(PurePosixPath(prefix) / name)


# ---- the command ---------------------------------------------------------------------------------------------------


def convert(path: Path, config: Config, *, progress: bool = False) -> Counter:
    """Writes the training file of an annotation file, as a whole or not at all, and returns the counts of its parts."""
    out = Path(config.out)
    if out.resolve() == path.resolve():
        raise ValueError(f"out is {config.out!r}: that is the annotation file; give another name")
    annotations = read_annotations(path, skip_empty_boxes=config.skip_empty_boxes, progress=progress)
    partial, counts = out.with_name(out.name + ".partial"), Counter()
    with partial.open("w", encoding="utf-8") as file:
        for image in tqdm(annotations.images.values(), "images", delay=5, disable=not progress):
            records, found = image_records(image, annotations, config)
            file.writelines(json.dumps(record) + "\n" for record in records)
            counts += found
    counts["unused"] = len(annotations.images) - counts["images"]
    if not counts["prompts"]:
        partial.unlink()
        raise ValueError(
            f"{path}: no prompt for any of its {counts['unused']} images: their boxes are too small, too many or "
            "incomplete; lower min_size or raise max_boxes"
        )
    partial.replace(out)
    return counts


def image_records(image: dict, annotations: Annotations, config: Config) -> tuple[list[dict], Counter]:
    """The lines about an image, and what there is to count in them."""
    boxes, absent = image_classes(image, annotations, config.min_size)
    rng = random.Random(f"{config.seed} {image['id']}")  # one for each image, so that other images do not matter
    prompts = list(draw_prompts(boxes, absent, config, rng))
    name = image_path(image, config.image_prefix)
    records = [
        training_record(f"{image['id']}-{number}", name, asked, truth) for number, (asked, truth) in enumerate(prompts)
    ]
    truths = [truth for _, truth in prompts if truth]
    counts = Counter(prompts=len(prompts), none=len(prompts) - len(truths))
    counts["images"] = 1 if prompts else 0
    counts["boxes"] = sum(len(found) for truth in truths for found in truth.values())
    counts["crowded"] = math.ceil(len(boxes) / config.max_classes) - len(truths)
    return records, counts


def main(argv: Sequence[str]) -> None:
    """Converts the file that the command line names and prints what was written."""
    parser = HfArgumentParser(Config, allow_abbrev=False, prog="python -m tools.prepare coco ANNOTATIONS.json")
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        return
    if len(argv) < 2 or argv[0] != "coco" or argv[1].startswith("--"):
        raise SystemExit(USAGE)
    config, unknown = parser.parse_args_into_dataclasses(
        list(argv[2:]), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"unknown option {' '.join(unknown)}: --help lists all options")
    counts = convert(Path(argv[1]), config, progress=True)
    print(
        f"{config.out}: {counts['prompts']} prompts on {counts['images']} images, with {counts['boxes']} boxes; "
        f"the answer to {counts['none']} prompts is None\n"
        f"left out: {counts['crowded']} prompts with more than {config.max_boxes} boxes, "
        f"{counts['unused']} images without a prompt"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
