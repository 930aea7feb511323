"""Samples, prompt texts and their order; the only module that reads data files and images.

docs/data.md shows the formats. Anything wrong with a file is refused before training, with the file, the line and the
remedy; doubtful input (a key given twice, NaN, a box that cannot be read) is refused rather than guessed.
Left out: parquet, hub data sets, video, colour profiles, conversations of several turns, system messages.
"""

import codecs
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

IMAGE_MARK = "<image>"  # where an image stands in a question; without marks the images come first, as in VLM-R1

# {question} is the sample's own text. "rec", "default", "detection" and "base" are the prompts that VLM-R1 trains and
# evaluates with, to the letter, because a base model's score depends on them; "plain" leaves the question alone.
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

QUESTION_KEYS = ("conversations", "messages", "prompt", "problem")  # the first that a record has counts
OTHER_KEYS = {"solution", "id", "image", "images", "accu_reward_method"}  # what a record holds besides is extra
MISTAKEN_KEYS = ("video", "videos", "img", "image_path", "image_paths")  # a sample would silently lose its picture
SPEAKERS = (("human", "user", None), ("gpt", "assistant", None))  # of the question and of the answer
MAX_HEADERS = 10_000  # images opened before training, evenly spread; a run checks the others as it uses them
MAX_SAMPLE = 1_000_000  # bytes; only an image written into the file makes a sample longer
# What Pillow may open. Its other plugins read files that no data set holds, and the one for EPS runs an interpreter.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "MPO")
_TOO_LONG = f"more than {MAX_SAMPLE:,} bytes; name an image by its path instead of writing it into the file"
_OUTSIDE = "leads out of the image root {root}; give the root it lies under, or allow it with --allow_outside_root"
_LISTED = re.compile(r"[\[{]\s*[^\]}\s]")  # a bracket that holds something


class BadSample(ValueError):
    """A sample that turns out to be unusable during the run: its image does not decode, its box leaves the image."""


@dataclass(frozen=True, slots=True)
class Sample:
    id: str
    question: str  # the user's text, before the template; it may mark where its images stand
    answer: str  # the truth without <answer> tags; boxes in pixels of the (first) original image
    images: tuple[str, ...]  # paths; empty for a question without images
    reward: str  # name of the accuracy reward, if the file names one for this sample
    has_boxes: bool  # whether `answer` holds boxes, which move into the space the model answers in
    source: str  # "file.jsonl:12" or "file.json, item 7", for messages
    root: str = ""  # the real path that the images must lie under; "" allows any
    file: int = 0  # number of the run's data file that it comes from or is evaluated like
    extra: dict = field(default_factory=dict, hash=False)  # the record's other keys, for rewards that want them


# ---- samples from files --------------------------------------------------------------------------------------------
def read_samples(
    path: str | Path, image_root: str | Path, *, has_boxes: bool = True, allow_outside_root: bool = False, file: int = 0
) -> list[Sample]:
    """The samples of a JSONL or JSON file, checked as far as the file alone allows.

    `has_boxes` says whether a list of four numbers is a box; a {"bbox_2d": ...} always is. Each sample keeps `file`.
    """
    path, image_root = Path(path), str(image_root)
    if not path.is_file():
        raise ValueError(f"{path}: no such data file; give --data the path of a .jsonl or .json file")
    if not os.path.isdir(image_root):
        raise ValueError(f"{image_root}: no such directory; give --image_root the one that holds the images of {path}")
    root = "" if allow_outside_root else os.path.realpath(image_root)
    samples, shared = [], {}  # many samples ask about one image or have the same extras: they share them
    for place, record in _records(path):
        try:
            fields = _read_record(record, has_boxes)
        except ValueError as error:
            raise ValueError(f"{path}{place}: {error}") from error
        images = tuple([os.path.join(image_root, name) for name in fields["images"]])
        fields["images"] = shared.setdefault(images, images)
        fields["extra"] = shared.setdefault(repr(fields["extra"]), fields["extra"])
        fields["id"] = f"{path.name}{place}" if fields["id"] is None else str(fields["id"])
        samples.append(Sample(**fields, source=f"{path}{place}", root=root, file=file))
    if not samples:
        raise ValueError(f"{path}: holds no sample; one JSON object per line is expected")
    return samples


def _records(path: Path) -> Iterator[tuple[str, object]]:
    """(":12", record) of each line, or (", item 7", record) of each item if the file holds one list."""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            for number, item in enumerate(_parsed(file.read(), str(path)), 1):
                if len(repr(item)) > MAX_SAMPLE:
                    raise ValueError(f"{path}, item {number}: {_TOO_LONG}")
                yield f", item {number}", item
            return
        count = 0
        for line, raw in enumerate(iter(lambda: file.readline(MAX_SAMPLE + 1), b""), 1):
            if len(raw) > MAX_SAMPLE:
                raise ValueError(f"{path}:{line}: {_TOO_LONG}")
            if raw.removeprefix(codecs.BOM_UTF8).strip():
                count += 1
                yield f":{line}", _parsed(raw, f"{path}:{line}")
    if count == 1 and path.suffix == ".json":
        raise ValueError(f"{path}: holds one object; a .json file holds a list of them: [{{...}}, {{...}}]")


def _parsed(raw: bytes, source: str) -> object:
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode()
        value = _DECODER.decode(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half a surrogate pair cannot be written: this refuses it
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, and what the two hooks refuse
        raise ValueError(f"{source}: not JSON: {error}; write one JSON object per line, or one list") from error


def _unique(pairs: list[tuple[str, object]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two values for the key {_short(max(names, key=names.count))} in {_short(record)}")
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_TRUTH = json.JSONDecoder(object_pairs_hook=_unique)  # for an answer's text, where NaN makes a box impossible


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _read_record(record: object, has_boxes: bool) -> dict:
    """What a record says, as fields of a Sample: images as it names them, and None for an id that it lacks."""
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} where an object is expected: {_short(record)}")
    key = next((key for key in QUESTION_KEYS if key in record), None)
    if key is None:
        raise ValueError(f"none of {', '.join(QUESTION_KEYS)} is among the keys {_short(sorted(record))}")
    question, answer = _question_and_answer(record, key)
    names, marks = _image_names(record), question.count(IMAGE_MARK)
    if marks not in (0, len(names)):
        raise ValueError(f"{marks} {IMAGE_MARK} marks for {len(names)} images; mark each image once or none")
    method = record.get("accu_reward_method") or ""
    if method and method not in list(VLM_R1_METHODS):  # the file may hold a list, which no dict can look up
        raise ValueError(f'"accu_reward_method" {_short(method)} is unknown: one of {", ".join(VLM_R1_METHODS)}')
    return {
        "id": record.get("id"),
        "question": question,
        "answer": answer,
        "images": names,
        "reward": VLM_R1_METHODS.get(method, ""),
        "has_boxes": _holds_boxes(answer, bare=has_boxes, has_reward=bool(method)),
        "extra": {name: value for name, value in record.items() if name != key and name not in OTHER_KEYS},
    }


def _question_and_answer(record: dict, key: str) -> tuple[str, str]:
    """The text of the question, with its images marked, and the truth."""
    contents = _turn_contents(record[key], key) if isinstance(record[key], list) else [record[key]]
    if "solution" in record:
        contents.append(record["solution"])
    if len(contents) != 2:
        raise ValueError(f'"{key}" and "solution" must hold a question and its answer; found {len(contents)} turns')
    question, answer = map(_joined, contents)
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question is {_short(question)}; a text is expected")
    text = answer if isinstance(answer, str) else json.dumps(answer)
    text = text.replace("<answer>", "").replace("</answer>", "").strip()
    if answer is None or not text or (IMAGE_MARK in text and isinstance(contents[1], list)):
        raise ValueError(f"the answer is {_short(answer)}; a text to compare a completion with is expected")
    return question, text


def _turn_contents(turns: list, key: str) -> list[object]:
    """What each turn says; the first must be the user's, and a second one the assistant's."""
    if not all(isinstance(turn, dict) and ("value" in turn or "content" in turn) for turn in turns):
        raise ValueError(f'"{key}" is {_short(turns)}; a list of turns with a "value" or "content" is expected')
    speakers = [turn.get("from", turn.get("role")) for turn in turns]
    if "system" in speakers:
        raise ValueError("a system message; put its text into --template and remove it from the file")
    if any(speaker not in names for speaker, names in zip(speakers, SPEAKERS, strict=False)):
        raise ValueError(f'turns by {_short(speakers)}; "human" or "user" asks and "gpt" or "assistant" answers')
    return [turn.get("value", turn.get("content")) for turn in turns]


def _joined(content: object) -> object:
    """The text of a turn that is a list of parts, as TRL writes it, with a mark for each image; or the turn itself."""
    parts = content if isinstance(content, list) else []
    if not parts or not all(isinstance(part, dict) and part.get("type") in ("text", "image") for part in parts):
        return content
    return "".join(IMAGE_MARK if part["type"] == "image" else str(part.get("text") or "") for part in parts)


def _image_names(record: dict) -> list[str]:
    if "image" in record and "images" in record:
        raise ValueError('both "image" and "images" are given; keep the one that names the images')
    for key in MISTAKEN_KEYS:
        if key in record:
            raise ValueError(f'"{key}" is given; "image" or "images" names the pictures, and videos are not read')
    key = "images" if "images" in record else "image"
    names = record.get(key, [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name and "\0" not in name for name in names):
        raise ValueError(f'"{key}" is {_short(names)}; a path, a list of paths, or no such key is expected')
    return names


def _holds_boxes(answer: str, *, bare: bool, has_reward: bool) -> bool:
    """Whether the truth holds boxes; refuses impossible boxes, and text that a reward would take for boxes."""
    boxes = answer_boxes(answer, bare=bare)
    for x1, y1, x2, y2 in boxes or ():
        if not (all(abs(side) < 1e9 for side in (x1, y1, x2, y2)) and x1 < x2 and y1 < y2):
            reason = f"box {_short([x1, y1, x2, y2])} has swapped corners or no area; [x1, y1, x2, y2] is expected"
            if min(x1, y1) >= 0 and min(x2, y2) > 0:
                reason += f". If this is x, y, width, height, write {_short([x1, y1, x1 + x2, y1 + y2])}"
            raise ValueError(reason)
    if boxes is None and ("bbox_2d" in answer or (bare and not has_reward and _LISTED.search(answer))):
        raise ValueError(
            f"the answer {_short(answer)} seems to hold boxes but cannot be read; write [x1, y1, x2, y2] or a list of "
            '{"bbox_2d": [x1, y1, x2, y2], "label": ...}, or choose a reward that reads no boxes'
        )
    return boxes is not None


def answer_boxes(answer: str, *, bare: bool = True) -> list[list[float]] | None:
    """The boxes of a truth: one for "[x1, y1, x2, y2]", all of a list of {"bbox_2d": ...}; None if it holds none."""
    try:
        value = _TRUTH.decode(unfence(answer))
    except (ValueError, RecursionError):  # ValueError: not JSON, a key given twice, a number of 5,000 digits
        return None
    if bare and _is_box(value):
        return [value]
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, dict) and _is_box(item.get("bbox_2d")) for item in items):
        return [item["bbox_2d"] for item in items]
    return None


def move_answer_boxes(answer: str, move: Callable[[list[float]], list[float]]) -> str:
    """The truth with each of its boxes replaced by move(box); labels and fence stay."""
    value = json.loads(unfence(answer))
    if _is_box(value):
        return json.dumps(move(value))
    items = [{**item, "bbox_2d": move(item["bbox_2d"])} for item in (value if isinstance(value, list) else [value])]
    moved = json.dumps(items if isinstance(value, list) else items[0])
    return f"```json\n{moved}\n```" if "```" in answer else moved


def unfence(text: str) -> str:
    """What stands inside the ```json fence of a truth, or the text itself."""
    return text.split("```")[1].removeprefix("json").strip() if "```" in text else text.strip()


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(side) in (int, float) for side in value)


# ---- checks before training ----------------------------------------------------------------------------------------
def check_samples(samples: list[Sample], *, boxes: bool = True, progress: bool = False) -> dict[str, tuple[int, int]]:
    """(width, height) of the images opened, by path; refuses missing or broken images and, with `boxes`, boxes outside.

    Costs one listing of each directory and at most MAX_HEADERS small reads, however many samples there are.
    """
    faults = _path_faults(samples)
    for sample in samples:
        if sample.has_boxes and not sample.images:
            raise ValueError(f"{sample.source}: a box without an image; name one, or choose rewards that read no boxes")
        for path in sample.images:
            if (path, sample.root) in faults:
                raise ValueError(f"{sample.source}: {_short(path)} {faults[path, sample.root]}")
    paths = list(dict.fromkeys(path for sample in samples for path in sample.images))
    checked = paths[:: max(1, math.ceil(len(paths) / MAX_HEADERS))]
    with ThreadPoolExecutor(8) as pool:  # on a network disk a header is a wait, not a computation
        reads = tqdm(pool.map(_header_size, checked), "headers", len(checked), disable=not progress or None, delay=5)
        sizes = dict(zip(checked, reads, strict=True))
    for sample in samples:
        for path in sample.images:
            if isinstance(sizes.get(path), str):
                raise ValueError(f"{sample.source}: {path} is no image ({sizes[path]}); replace it or drop the sample")
        if boxes and sample.images and sample.images[0] in sizes:
            check_boxes(sample, sizes[sample.images[0]])
    return sizes


def _path_faults(samples: list[Sample]) -> dict[tuple[str, str], str]:
    """(path, root) -> what is wrong, for each path that is no file or does not lie under its root."""
    faults, list_files, lies_under = {}, functools.cache(_list_files), functools.cache(_lies_under)
    wanted = frozenset(path.rpartition("/")[2] for sample in samples for path in sample.images)
    for path, root in ((path, sample.root) for sample in samples for path in sample.images):
        directory, _, name = path.rpartition("/")
        files = list_files(directory, wanted)
        is_file = os.path.isfile(path) if files is None else name in files
        is_link = files is None or files.get(name, False)
        if not lies_under(directory, root) or (is_link and not lies_under(path, root)):
            faults[path, root] = _OUTSIDE.format(root=root)
        elif not is_file:
            hint = '; a path made on Windows must have "/" for each backslash' if "\\" in path else ""
            faults[path, root] = f"is no file; check the image root and the name{hint}"
    return faults


def _list_files(directory: str, wanted: frozenset[str]) -> dict[str, bool] | None:
    """Whether each of these files is a link, for those in the directory; None if it cannot be listed."""
    try:  # one listing: on a network disk a question per file is a round trip each
        with os.scandir(directory) as entries:
            return {entry.name: entry.is_symlink() for entry in entries if entry.name in wanted and entry.is_file()}
    except OSError:
        return None


def _lies_under(path: str, root: str) -> bool:
    """Whether the path, with its links followed, leads to something under that real path."""
    return not root or os.path.commonpath((os.path.realpath(path), root)) == root


def check_boxes(sample: Sample, size: tuple[int, int]) -> None:
    """Refuses a sample whose true box leaves its image; one pixel beyond the edge is rounding."""
    width, height = size
    boxes = answer_boxes(sample.answer) if sample.has_boxes else None
    for x1, y1, x2, y2 in boxes or ():
        if x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1:
            raise BadSample(
                f"{sample.source}: box {[x1, y1, x2, y2]} leaves its image of {width} x {height} pixels; "
                "boxes are in pixels of the original image"
            )


def _header_size(path: str) -> tuple[int, int] | str:
    """(width, height) as shown, or the reason why there is none."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            # getexif decodes a whole PNG to look for a block behind the pixels; Image.open has read those before them.
            before = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys()
            exif = image.getexif() if image.format != "PNG" or before else {}
            sideways = exif.get(0x0112) in (5, 6, 7, 8) and image.format != "TIFF"  # a TIFF is turned by Image.open
            return image.size[::-1] if sideways else image.size
    except Exception as error:  # broken bytes make Pillow's plugins raise anything: OSError, KeyError, SyntaxError
        return f"{type(error).__name__}: {error}"


# ---- images --------------------------------------------------------------------------------------------------------
def load_image(path: str, root: str = "") -> Image.Image:
    """The image as a viewer shows it, in RGB; BadSample if it does not decode or no longer lies under the root."""
    if root and not _lies_under(path, root):
        raise BadSample(f"{_short(path)} {_OUTSIDE.format(root=root)}")
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return _as_shown(image)
    except Exception as error:  # as in _header_size
        raise BadSample(f"{path} does not decode: {type(error).__name__}: {error}") from error


def _as_shown(image: Image.Image) -> Image.Image:
    """RGB: upright, the first frame, 16 bits scaled to 8, transparency on white."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = ImageOps.exif_transpose(image)
    if sixteen:  # convert() would clip at 255 and turn nearly everything white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode!r} does not say what white is; save the image with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    shown = Image.new("RGB", image.size, "white")
    shown.paste(layered, mask=layered.getchannel("A"))
    return shown


# ---- prompts -------------------------------------------------------------------------------------------------------
def template_text(template: str) -> str:
    """The template of that name, or the text itself if it holds {question}."""
    if template not in TEMPLATES and "{question}" not in template:
        raise ValueError(
            f"template {template!r} is unknown: one of {', '.join(TEMPLATES)}, or a text with {{question}}"
        )
    return TEMPLATES.get(template, template)


def chat_messages(sample: Sample, template: str) -> list[dict]:
    """The one user turn of a sample: leading or unmarked images first, then the question inside the template."""
    text, leading = sample.question, 0 if IMAGE_MARK in sample.question else len(sample.images)
    while text.startswith(IMAGE_MARK):
        text, leading = text.removeprefix(IMAGE_MARK).lstrip("\n"), leading + 1
    text = IMAGE_MARK * leading + template_text(template).replace("{question}", text)
    first, *rest = text.split(IMAGE_MARK)
    content = [{"type": "text", "text": first}]
    for part in rest:
        content += [{"type": "image"}, {"type": "text", "text": part}]
    return [{"role": "user", "content": [part for part in content if part.get("text") != ""]}]


# ---- order ---------------------------------------------------------------------------------------------------------
def step_indices(num_samples: int, per_step: int, step: int, seed: int) -> list[int]:
    """The indices of a step's samples: a new permutation each epoch, the same on every process and after a resume."""
    return _shuffled(range(step * per_step, (step + 1) * per_step), num_samples, (seed,))


def mixed_indices(sizes: list[int], shares: list[float], per_step: int, step: int, seed: int) -> list[int]:
    """Indices into the samples of all files in a row; each file is shuffled by itself and gives what share_out says."""
    before, after = (share_out(count * per_step, shares) for count in (step, step + 1))
    indices = []
    for file, size in enumerate(sizes):
        drawn = _shuffled(range(before[file], after[file]), size, (seed, file))
        indices += [sum(sizes[:file]) + index for index in drawn]
    return indices


def share_out(total: int, shares: list[float]) -> list[int]:
    """Whole numbers that add up to the total, each close to its share of it (Sainte-Lague's rounding).

    No number falls when the total grows (with largest remainders it may), so a step takes the difference of two totals.
    """
    # A number differs from its quota by at most (files + 1) / 2, so the search may begin that far below it.
    counts = [max(0, int(total * share / sum(shares)) - len(shares)) for share in shares]
    while sum(counts) < total:
        claims = [share / (2 * count + 1) for share, count in zip(shares, counts, strict=True)]
        counts[claims.index(max(claims))] += 1
    return counts


def _shuffled(positions: range, size: int, seed: tuple[int, ...]) -> list[int]:
    """Which of `size` things stand at these positions of an endless row of permutations."""
    places = [divmod(position, size) for position in positions]
    orders = {epoch: np.random.default_rng((*seed, epoch)).permutation(size) for epoch, _ in places}
    return [int(orders[epoch][offset]) for epoch, offset in places]
