"""Detection data: COCO-style annotations (COCO, D3, LVIS) become training lines of VLM-R1's format, absent classes too.

`python prepare.py coco annotations.json --out ovd.jsonl` asks each image for its classes, a few at a time, among absent
ones, and now and then for absent ones alone, where the truth is "None". A class is asked only where the file settles
its boxes: not where a crowd, or LVIS's not_exhaustive_category_ids, says that some are unmarked. It counts as absent
only where nothing marks it, and where LVIS names neg_category_ids, only if it is among them. The annotation file is
loaded whole and checked before a line is written; the lines are streamed.
Left out: images without a box of an askable class, masks, synonyms, negatives chosen for being hard.
"""

import json
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

# The question of VLM-R1's paper (arXiv 2504.07615, 5.1). The targets are a JSON list, since captions hold commas.
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
RESERVED = (IMAGE_MARK, "```", "<answer>", "</answer>")  # what data.py and the rewards cut a text at
Id = int | str
Box = list[float]


@dataclass(frozen=True)
class Config:
    out: str = HfArg(default="ovd.jsonl", help="the file to write; one of that name is replaced when all is done")
    negatives: int = HfArg(default=2, help="absent classes asked in every prompt, as far as there are any")
    none_share: float = HfArg(default=0.1, help="expected share of prompts with absent classes only; below 1")
    max_classes: int = HfArg(default=4, help="present classes per prompt at most; more make several prompts")
    min_size: float = HfArg(default=0.0, help="drop boxes with a side shorter than this many pixels")
    max_boxes: int = HfArg(default=30, help="leave out prompts whose classes have more boxes than this in the image")
    skip_empty_boxes: bool = HfArg(default=False, help="drop boxes without area (COCO train2017 has two), not refuse")
    seed: int = HfArg(default=0, help="seed of the draw and the order of classes")
    image_prefix: str = HfArg(default="", help="directory put before every image name")

    def __post_init__(self) -> None:
        for name, least in {"negatives": 0, "max_classes": 1, "min_size": 0, "max_boxes": 1, "seed": 0}.items():
            if not least <= getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        if not 0 <= self.none_share < 1:
            raise ValueError(f"none_share is {self.none_share}: it must be at least 0 and below 1")
        if Path(self.out).is_dir() or not Path(self.out).parent.is_dir():
            raise ValueError(f"out is {self.out!r}: give a file in a directory that exists")


@dataclass(frozen=True)
class Annotations:
    names: dict[Id, str]  # of the categories
    images: dict[Id, dict]  # as in the file
    marks: dict[Id, list[tuple[Id, Box | None, bool]]]  # per image: category, box (None: no area), whether a crowd


def read_annotations(path: Path, *, skip_empty_boxes: bool = False, progress: bool = False) -> Annotations:
    """The categories, images and marks of a COCO-style file, each in the order of its ids; broken ones are refused."""
    if not path.is_file():
        raise ValueError(f"{path}: no such annotation file; give the path of a COCO-style .json file")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, a number of 5,000 digits
        raise ValueError(f"{path}: not JSON: {error}; a COCO-style file of one JSON object is expected") from error
    categories, images, annotations = (_records_by_id(value, kind, path) for kind in KEYS)
    names = _category_names(categories, path)
    for number, image in images.items():
        _check_image(image, names, f"{path}: image {number!r}")
    marks: dict[Id, list] = {number: [] for number in images}
    for number, mark in tqdm(annotations.items(), "annotations", delay=5, disable=not progress):
        source = f"{path}: annotation {number!r}"
        for key, known in (("image_id", images), ("category_id", names)):
            if type(mark[key]) not in (int, str) or mark[key] not in known:
                raise ValueError(f"{source}: {key} {mark[key]!r} is unknown; add what it names or drop the annotation")
        crowd = mark.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise ValueError(f"{source}: iscrowd is {crowd!r}; 0, 1 or no such key is expected")
        box = corner_box(mark["bbox"], images[mark["image_id"]], source)
        if box is None and not skip_empty_boxes:
            raise ValueError(f"{source}: bbox {mark['bbox']} has no area; correct it, or give --skip_empty_boxes")
        marks[mark["image_id"]].append((mark["category_id"], box, bool(crowd)))
    return Annotations(names, images, marks)


def _records_by_id(value: object, kind: str, path: Path) -> dict[Id, dict]:
    records = value.get(kind) if isinstance(value, dict) else None
    if not isinstance(records, list) or not records:
        raise ValueError(f'{path}: no list "{kind}" with anything in it; one object of {", ".join(KEYS)} is expected')
    by_id = {}
    for place, record in enumerate(records):
        number = record.get("id") if isinstance(record, dict) else None
        if type(number) not in (int, str):
            raise ValueError(f"{path}: {kind}[{place}]: id is {number!r}; a whole number or a text is expected")
        missing = [key for key in KEYS[kind] if key not in record]
        if missing:
            raise ValueError(f"{path}: {kind} id {number!r}: no {', '.join(missing)}; add the key or drop the entry")
        if number in by_id:
            raise ValueError(f"{path}: {kind} id {number!r} stands there twice; give each entry an id of its own")
        by_id[number] = record
    return {number: by_id[number] for number in sorted(by_id, key=lambda number: (isinstance(number, str), number))}


def _category_names(categories: dict[Id, dict], path: Path) -> dict[Id, str]:
    owners: dict[str, Id] = {}
    for number, category in categories.items():
        name, source = category["name"], f"{path}: category {number!r}"
        if not isinstance(name, str) or not name.strip() or any(mark in name for mark in RESERVED):
            raise ValueError(f"{source}: the name is {name!r}; a text without {' '.join(RESERVED)} is expected")
        if name.strip() in owners:
            raise ValueError(f"{source}: {name!r} is category {owners[name.strip()]!r} too; merge or rename one")
        owners[name.strip()] = number
    return {number: name for name, number in owners.items()}


def _check_image(image: dict, names: dict[Id, str], source: str) -> None:
    for key in ("width", "height"):
        if type(image[key]) is not int or image[key] <= 0:
            raise ValueError(f"{source}: {key} is {image[key]!r}; a whole number of pixels above 0 is expected")
    name = image.get("file_name") or image.get("coco_url")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{source}: file_name is {name!r}; add the image's path below the image root")
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        ids = image.get(key, [])
        if not isinstance(ids, list) or not all(type(number) in (int, str) and number in names for number in ids):
            raise ValueError(f"{source}: {key} is {str(ids)[:80]}; a list of the ids of categories is expected")


def corner_box(bbox: object, image: dict, source: str) -> Box | None:
    """[x1, y1, x2, y2] inside the image from COCO's [x, y, width, height]; None if that has no area."""
    # 1e9 bounds what is no pixel, NaN included; rounding comes before the test of the area, since it can take it away.
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(type(s) in (int, float) and abs(s) < 1e9 for s in bbox):
        raise ValueError(f"{source}: bbox is {str(bbox)[:80]}; [x, y, width, height], four finite numbers, is expected")
    x, y = bbox[:2]
    x1, y1, x2, y2 = (round(side, 2) for side in (x, y, x + bbox[2], y + bbox[3]))
    if x1 >= x2 or y1 >= y2:
        return None
    box = [max(x1, 0), max(y1, 0), min(x2, image["width"]), min(y2, image["height"])]
    if box[0] >= box[2] or box[1] >= box[3]:
        size = f"{image['width']} x {image['height']}"
        raise ValueError(f"{source}: bbox {bbox} lies outside its image of {size} pixels; correct or drop it")
    return box


def image_classes(image: dict, annotations: Annotations, min_size: float) -> tuple[dict[str, list[Box]], list[str]]:
    """The boxes of each class that may be asked of an image, and the classes known to be absent from it."""
    marks, names = annotations.marks[image["id"]], annotations.names
    unsettled = set(image.get("not_exhaustive_category_ids", ())) | {number for number, _, crowd in marks if crowd}
    boxes: dict[str, list[Box]] = {}
    for number, box, _ in marks:
        if number not in unsettled and box and min(box[2] - box[0], box[3] - box[1]) >= min_size:
            boxes.setdefault(names[number], []).append(box)
    marked = {number for number, _, _ in marks}
    allowed = set(image.get("neg_category_ids", names)) - unsettled - marked  # a class of dropped boxes is there, too
    ordered = {names[number]: boxes[names[number]] for number in names if names[number] in boxes}
    return ordered, [names[number] for number in names if number in allowed]


def draw_prompts(
    boxes: dict[str, list[Box]], absent: list[str], config: Config, rng: random.Random
) -> Iterator[tuple[list[str], dict[str, list[Box]]]]:
    """(classes asked, boxes of the present ones) of each prompt about an image."""
    present = rng.sample(list(boxes), len(boxes))
    for start in range(0, len(present), config.max_classes):
        chosen = present[start : start + config.max_classes]
        if sum(len(boxes[name]) for name in chosen) > config.max_boxes:
            continue
        asked = chosen + rng.sample(absent, min(config.negatives, len(absent)))
        rng.shuffle(asked)
        yield asked, {name: boxes[name] for name in asked if name in boxes}
        # s / (1 - s) more on average, which is a share of s. As many classes as above, or the length gives it away.
        while absent and rng.random() < config.none_share:
            yield rng.sample(absent, min(len(asked), len(absent))), {}


def training_record(sample_id: str, image: str, asked: list[str], boxes: dict[str, list[Box]]) -> dict:
    """A line of VLM-R1's training file: the question for the classes asked and the fenced boxes, or "None"."""
    items = [{"bbox_2d": box, "label": name} for name in boxes for box in boxes[name]]
    question = IMAGE_MARK + QUESTION.replace("{targets}", json.dumps(asked, ensure_ascii=False))
    answer = f"```json\n{json.dumps(items, ensure_ascii=False)}\n```" if items else "None"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": sample_id, "image": image, "conversations": turns, "accu_reward_method": "odLength"}


def image_path(image: dict, prefix: str) -> str:
    """The image's path below the image root: prefix and file_name, or for LVIS v1 the end of its coco_url."""
    name = image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:])  # train2017/000000391895.jpg
    return str(PurePosixPath(prefix) / name)


def convert(path: Path, config: Config, *, progress: bool = False) -> Counter:
    """Writes the lines of an annotation file to config.out, whole or not at all, and returns what it counted."""
    out = Path(config.out)
    if out.resolve() == path.resolve():
        raise ValueError(f"out is {config.out!r}: that is the annotation file; give another name")
    annotations = read_annotations(path, skip_empty_boxes=config.skip_empty_boxes, progress=progress)
    partial, counts = out.with_name(out.name + ".partial"), Counter()
    with partial.open("w", encoding="utf-8") as file:
        for image in tqdm(annotations.images.values(), "images", delay=5, disable=not progress):
            boxes, absent = image_classes(image, annotations, config.min_size)
            rng = random.Random(f"{config.seed} {image['id']}")  # its own, so that other images do not matter
            prompts = list(draw_prompts(boxes, absent, config, rng))
            path_in_root = image_path(image, config.image_prefix)
            for number, (asked, truth) in enumerate(prompts):
                record = training_record(f"{image['id']}-{number}", path_in_root, asked, truth)
                file.write(json.dumps(record) + "\n")
            truths = [truth for _, truth in prompts if truth]
            counts["prompts"] += len(prompts)
            counts["none"] += len(prompts) - len(truths)
            counts["boxes"] += sum(len(some) for truth in truths for some in truth.values())
            counts["crowded"] += -(-len(boxes) // config.max_classes) - len(truths)
            counts["images" if prompts else "unused"] += 1
    if not counts["prompts"]:
        partial.unlink()
        raise ValueError(f"{path}: no prompt comes of {counts['unused']} images; lower min_size or raise max_boxes")
    partial.replace(out)
    return counts


def main(argv: Sequence[str]) -> None:
    parser = HfArgumentParser(Config, allow_abbrev=False, prog="prepare.py coco annotations.json")
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        return
    if len(argv) < 2 or argv[0] != "coco" or argv[1].startswith("--"):
        raise SystemExit(
            "usage: python prepare.py coco annotations.json [--out ovd.jsonl] [options]; --help lists them"
        )
    config = parser.parse_args_into_dataclasses(args=list(argv[2:]), look_for_args_file=False)[0]
    counts = convert(Path(argv[1]), config, progress=True)
    print(
        f"{config.out}: {counts['prompts']} prompts on {counts['images']} images, {counts['boxes']} boxes, "
        f"{counts['none']} answered None; left out: {counts['crowded']} prompts of more than {config.max_boxes} boxes, "
        f"{counts['unused']} images without a prompt"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
