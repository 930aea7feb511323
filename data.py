"""Samples, prompt texts and their order; the only module that reads data files and images.

Two formats of VLM-R1 are read: its training JSONL ({"image", "conversations"}) and its evaluation JSON (a list of
{"image", "problem", "solution"}). Whatever is wrong with a file is said before training, with file, line and remedy.
Left out: parquet, hub data sets, video.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

IMAGE_MARK = "<image>"  # where an image stands in a question; without marks the images come first, as in VLM-R1

# {question} is the sample's own text. "rec", "default", "detection" and "base" are the prompts VLM-R1 trains and
# evaluates with, to the letter, since a base model's score depends on them; "plain" leaves the question alone.
TEMPLATES = {
    "rec": "{question} First output the thinking process in <think> </think> tags and then output the final answer in "
    "<answer> </answer> tags. Output the final answer in JSON format.",
    "default": "{question} First output the thinking process in <think> </think> tags and then output the final answer "
    "in <answer> </answer> tags.",
    "detection": "First thinks about the reasoning process in the mind and then provides the user with the answer. The "
    "reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think><answer> answer here </answer>.\n{question}",
    "no_think": "{question} Output the final answer in <answer> </answer> tags.",
    "base": "{question} Please provide the bounding box coordinate in JSON format.",
    "plain": "{question}",
}

# "accu_reward_method" of VLM-R1's files -> our reward. Its "llm" judge and tag-less "map" have no counterpart here.
_SAME_NAME = ("mcq", "yes_no", "math", "default", "weighted_sum", "od_ap", "od_ap50", "all_match")
VLM_R1_METHODS = {"odLength": "od_length", **{name: name for name in _SAME_NAME}}

# Headers opened before training; beyond it an even share is, and the rest is checked when drawn (0.2 ms an image).
MAX_HEADERS = 20_000


class BadSample(ValueError):
    """A sample that cannot be used, found only while running: its image does not decode, its box leaves the image."""


@dataclass(frozen=True)
class Sample:
    id: str
    question: str  # the user's text, images marked or not, template not yet applied
    answer: str  # the truth without <answer> tags; boxes in pixels of the (first) original image
    images: tuple[str, ...]  # paths, none for a text question
    reward: str  # name of the accuracy reward if the file names one for this sample, else ""
    has_boxes: bool  # whether `answer` holds boxes, which then move into the space the model answers in
    source: str  # "file.jsonl:12", for messages


def read_samples(path: str | Path, image_root: str | Path, *, has_boxes: bool = True) -> list[Sample]:
    """The samples of a JSONL or JSON file, checked as far as the file alone allows.

    `has_boxes` says whether a list of four numbers is a box; a {"bbox_2d": ...} always is.
    """
    path, root = Path(path), Path(image_root)
    if not path.is_file():
        raise ValueError(f"{path}: no such data file; give --data the path of a .jsonl or .json file")
    if not root.is_dir():
        raise ValueError(f"{root}: no such directory; give --image_root the one that the images of {path} lie under")
    samples = [_read_sample(record, f"{path}:{line}", root, has_boxes) for line, record in _records(path)]
    if not samples:
        raise ValueError(f"{path}: holds no sample; one JSON object a line is expected")
    return samples


def _records(path: Path):
    """(line, record) of each JSON object: of a list in a .json file, one a line otherwise."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    if path.suffix == ".json":
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}; a list of objects is expected") from error
        if not isinstance(records, list):
            raise ValueError(f"{path}:1: a {type(records).__name__}, but a list of objects is expected")
        yield from enumerate(records, 1)  # the number of the object, since a list has no lines
        return
    for line, content in enumerate(text.split("\n"), 1):  # not splitlines: JSON text may hold U+2028
        if not content.strip():
            continue
        try:
            yield line, json.loads(content)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}:{line}: not JSON: {error}; each line must hold one JSON object") from error


def _read_sample(record: object, source: str, root: Path, has_boxes: bool) -> Sample:
    if not isinstance(record, dict):
        raise ValueError(f"{source}: a {type(record).__name__} where an object is expected: {str(record)[:80]!r}")
    if "conversations" in record:
        question, answer = _first_exchange(record["conversations"], source)
    elif "problem" in record and "solution" in record:
        question, answer = record["problem"], record["solution"]
    else:
        raise ValueError(
            f'{source}: neither "conversations" nor "problem" and "solution" among the keys {sorted(record)}'
        )
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{source}: the question is {question!r}; a text is expected")
    answer = answer if isinstance(answer, str) else json.dumps(answer)
    answer = answer.replace("<answer>", "").replace("</answer>", "").strip()
    names = record.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'{source}: "image" is {names!r}; a path, a list of paths, or no such key is expected')
    marks = question.count(IMAGE_MARK)
    if marks not in (0, len(names)):
        raise ValueError(f"{source}: {marks} {IMAGE_MARK} marks for {len(names)} images; mark each image once or none")
    reward = record.get("accu_reward_method", "")
    if reward and reward not in VLM_R1_METHODS:
        raise ValueError(f'{source}: "accu_reward_method" {reward!r} is unknown: one of {", ".join(VLM_R1_METHODS)}')
    boxes = answer_boxes(answer, bare=has_boxes)
    for box in boxes or ():
        if not (all(math.isfinite(side) for side in box) and box[0] < box[2] and box[1] < box[3]):
            raise ValueError(
                f"{source}: box {box} has swapped corners or no area; [x1, y1, x2, y2] with x1 < x2 and "
                "y1 < y2 is expected"
            )
    return Sample(
        id=str(record.get("id", source)),
        question=question,
        answer=answer,
        images=tuple(str(root / name) for name in names),
        reward=VLM_R1_METHODS.get(reward, ""),
        has_boxes=boxes is not None,
        source=source,
    )


def _first_exchange(turns: object, source: str) -> tuple[object, object]:
    if (
        not isinstance(turns, list)
        or len(turns) < 2
        or not all(isinstance(t, dict) and "value" in t for t in turns[:2])
    ):
        raise ValueError(
            f'{source}: "conversations" must hold the question\'s turn and the answer\'s, each with a "value"'
        )
    if len(turns) > 2:
        raise ValueError(f"{source}: {len(turns)} turns; one question and one answer are trained on, so split the line")
    return turns[0]["value"], turns[1]["value"]


def answer_boxes(answer: str, *, bare: bool = True) -> list[list[float]] | None:
    """The boxes of a truth: one for "[x1, y1, x2, y2]", all of a list of {"bbox_2d": ...}; None if it holds none."""
    try:
        value = json.loads(unfence(answer))
    except (json.JSONDecodeError, RecursionError):
        return None
    if bare and _is_box(value):
        return [value]
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, dict) and _is_box(item.get("bbox_2d")) for item in items):
        return [item["bbox_2d"] for item in items]
    return None


def move_answer_boxes(answer: str, move) -> str:
    """The truth with each of its boxes replaced by move(box); labels and fence are kept."""
    value = json.loads(unfence(answer))
    if _is_box(value):
        return json.dumps(move(value))
    items = [{**item, "bbox_2d": move(item["bbox_2d"])} for item in (value if isinstance(value, list) else [value])]
    moved = json.dumps(items if isinstance(value, list) else items[0])
    return f"```json\n{moved}\n```" if "```" in answer else moved


def unfence(text: str) -> str:
    """What stands inside the ```json fence of a truth, or the text itself."""
    if "```" not in text:
        return text.strip()
    return text.split("```")[1].removeprefix("json").strip()


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(side) in (int, float) for side in value)


def check_samples(samples: list[Sample], *, progress: bool = False) -> None:
    """Refuses missing images, unreadable headers and boxes outside their image, with file, line, value and remedy."""
    paths = list(dict.fromkeys(path for sample in samples for path in sample.images))
    missing = {path for path in paths if not Path(path).is_file()}
    for sample in samples:
        if sample.has_boxes and not sample.images:
            raise ValueError(f"{sample.source}: a box without an image; name one, or choose rewards that read no boxes")
        for path in sample.images:
            if path in missing:
                raise ValueError(f"{sample.source}: no image at {path}; check the file's image root and the name")
    stride = -(-len(paths) // MAX_HEADERS) if paths else 1
    sizes = {}
    with ThreadPoolExecutor(8) as pool:  # headers are waited for on a network disk, not computed
        checked = paths[::stride]
        reads = tqdm(pool.map(_header_size, checked), "image headers", len(checked), disable=not progress, delay=5)
        for path, size in zip(checked, reads, strict=True):
            sizes[path] = size
    for sample in samples:
        for path in sample.images:
            if isinstance(sizes.get(path), str):
                raise ValueError(f"{sample.source}: {path} is no image ({sizes[path]}); replace it or drop the line")
        if sample.images and sample.images[0] in sizes:
            check_boxes(sample, sizes[sample.images[0]])


def check_boxes(sample: Sample, size: tuple[int, int]) -> None:
    """Refuses a sample of which a true box leaves its image; one pixel beyond is rounding."""
    width, height = size
    for x1, y1, x2, y2 in (answer_boxes(sample.answer) or []) if sample.has_boxes else []:
        if x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1:
            raise BadSample(
                f"{sample.source}: box {[x1, y1, x2, y2]} leaves its image of {width} x {height} pixels; "
                "boxes are in pixels of the original image"
            )


def _header_size(path: str) -> tuple[int, int] | str:
    """(width, height) as shown, or the reason why there is none."""
    try:
        with Image.open(path) as image:
            return _shown_size(image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:  # ValueError: an oversized text chunk
        return str(error)


def _shown_size(image: Image.Image) -> tuple[int, int]:
    # getexif decodes a whole PNG in search of a block that may follow the pixels; opening has read what precedes them.
    exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
    sideways = exif.get(0x0112, 1) >= 5  # orientation: turned by a quarter
    return image.size[::-1] if sideways else image.size


def load_image(path: str) -> Image.Image:
    """The image as a viewer shows it, in RGB; BadSample if it does not decode."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise BadSample(f"{path} does not decode: {error}") from error


def template_text(template: str) -> str:
    """The template of that name, or the text itself if it holds {question}."""
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{question}" in template:
        return template
    raise ValueError(
        f"template {template!r} is unknown: one of {', '.join(TEMPLATES)}, or a text that holds {{question}}"
    )


def chat_messages(sample: Sample, template: str) -> list[dict]:
    """The one user turn of a sample: images that lead (or are not marked) first, the template around the rest."""
    text, leading = sample.question, 0 if IMAGE_MARK in sample.question else len(sample.images)
    while text.startswith(IMAGE_MARK):
        text, leading = text.removeprefix(IMAGE_MARK).lstrip("\n"), leading + 1
    text = IMAGE_MARK * leading + template_text(template).replace("{question}", text)
    content = []
    for number, part in enumerate(text.split(IMAGE_MARK)):
        content += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": part}] * bool(part)
    return [{"role": "user", "content": content}]


def step_indices(num_samples: int, per_step: int, step: int, seed: int) -> list[int]:
    """Indices of the samples of a step, counted from 0: a new permutation each epoch, nothing dropped in between.

    A function of the position alone, so a resumed run goes on where it stopped and any number of processes agrees.
    """
    places = [divmod(position, num_samples) for position in range(step * per_step, (step + 1) * per_step)]
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(num_samples) for epoch, _ in places}
    return [int(orders[epoch][offset]) for epoch, offset in places]
