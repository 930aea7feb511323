"""Samples, prompt texts and their order; the only module that reads data files and images.

Two formats of VLM-R1 are read: its training JSONL ({"image", "conversations"}) and its evaluation JSON (a list of
{"image", "problem", "solution"}). Whatever is wrong with a file is said before training, with file, line and remedy.
What is doubtful (a key given twice, NaN, a box that cannot be read) is refused and not guessed.
Left out: parquet, hub data sets, video, colour profiles.
"""

import codecs
import json
import os
import re
from collections.abc import Iterator
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
MAX_HEADERS = 10_000
MAX_LINE = 1_000_000  # bytes: no prompt is that long; an image written into the line is

# What Pillow may open. Its other plugins are for files no data set holds; the one for EPS runs an interpreter.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "MPO")


class BadSample(ValueError):
    """A sample that cannot be used, found only while running: its image does not decode, its box leaves the image."""


@dataclass(frozen=True, slots=True)
class Sample:
    id: str
    question: str  # the user's text, images marked or not, template not yet applied
    answer: str  # the truth without <answer> tags; boxes in pixels of the (first) original image
    images: tuple[str, ...]  # paths, none for a text question
    reward: str  # name of the accuracy reward if the file names one for this sample, else ""
    has_boxes: bool  # whether `answer` holds boxes, which then move into the space the model answers in
    source: str  # "file.jsonl:12", for messages
    root: str = ""  # the real path that the images must lie under; "" for anywhere
    file: int = 0  # which of the run's data files it is from, or is evaluated like


def read_samples(
    path: str | Path,
    image_root: str | Path,
    *,
    has_boxes: bool = True,
    allow_outside_root: bool = False,
    file: int = 0,
) -> list[Sample]:
    """The samples of a JSONL or JSON file, checked as far as the file alone allows.

    `has_boxes` says whether a list of four numbers is a box; a {"bbox_2d": ...} always is. `file` is put down in each.
    """
    path, root = Path(path), Path(image_root)
    if not path.is_file():
        raise ValueError(f"{path}: no such data file; give --data the path of a .jsonl or .json file")
    if not root.is_dir():
        raise ValueError(f"{root}: no such directory; give --image_root the one that the images of {path} lie under")
    inside = "" if allow_outside_root else os.path.realpath(root)
    shared = {}  # many samples ask about one image: they share its path
    options = {"root": str(root), "inside": inside, "has_boxes": has_boxes, "shared": shared, "file": file}
    samples = [_read_sample(record, f"{path}:{line}", **options) for line, record in _records(path)]
    if not samples:
        raise ValueError(f"{path}: holds no sample; one JSON object a line is expected")
    return samples


def _records(path: Path) -> Iterator[tuple[int, object]]:
    """(line, record) of each JSON object: one a line, or those of a file that is one list, which are counted."""
    with open(path, "rb") as file:
        listed = None
        for line, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if not raw.strip():
                continue
            listed = raw.lstrip().startswith(b"[") if listed is None else listed
            if listed:
                file.seek(0)
                yield from _listed_records(_utf8(file.read(), str(path)).removeprefix("\ufeff"), path)
                return
            if len(raw) > MAX_LINE:
                raise ValueError(f"{path}:{line}: {_TOO_LONG}")
            yield line, _parsed(_utf8(raw, f"{path}:{line}"), 0, f"{path}:{line}")[0]


def _listed_records(text: str, path: Path) -> Iterator[tuple[int, object]]:
    number, at = 0, _SPACES.match(text, text.index("[") + 1).end()
    while not text.startswith("]", at):
        number += 1
        record, at = _parsed(text, at, f"{path}:{number}", ",]")
        yield number, record
        at = _SPACES.match(text, at + 1).end() if text[at] == "," else at


def _parsed(text: str, at: int, source: str, follows: str = "") -> tuple[object, int]:
    """The JSON value that starts there, and where the next thing does: one of `follows`, or nothing."""
    try:
        value, end = _DECODER.raw_decode(text, _SPACES.match(text, at).end())
    except (ValueError, RecursionError) as error:  # ValueError: a number of 5,000 digits, and what _DECODER refuses
        raise ValueError(f"{source}: not JSON: {error}; each line must hold one JSON object") from error
    if end - at > MAX_LINE:
        raise ValueError(f"{source}: {_TOO_LONG}")
    after = _SPACES.match(text, end).end()
    if text[after : after + 1] not in (set(follows) or {""}):
        raise ValueError(f"{source}: not JSON: {_short(text[after : after + 20])} follows the object; a line holds one")
    return value, after


def _utf8(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error


def _unique(pairs: list[tuple[str, object]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two values for the key {_short(max(names, key=names.count))}")
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


_TOO_LONG = f"more than {MAX_LINE:,} bytes; an image is named by its path and not written into the file"
_SPACES = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_TRUTH = json.JSONDecoder(object_pairs_hook=_unique)  # of the text of an answer


def _short(value: object) -> str:
    """A value as a message shows it, whatever the file holds."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _read_sample(
    record: object, source: str, *, root: str, inside: str, has_boxes: bool, shared: dict[tuple, tuple], file: int
) -> Sample:
    if not isinstance(record, dict):
        raise ValueError(f"{source}: a {type(record).__name__} where an object is expected: {_short(record)}")
    if "conversations" in record:
        question, answer = _first_exchange(record["conversations"], source)
    elif "problem" in record and "solution" in record:
        question, answer = record["problem"], record["solution"]
    else:
        raise ValueError(
            f'{source}: neither "conversations" nor "problem" and "solution" among the keys {_short(sorted(record))}'
        )
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{source}: the question is {_short(question)}; a text is expected")
    text = answer if isinstance(answer, str) else json.dumps(answer)
    text = text.replace("<answer>", "").replace("</answer>", "").strip()
    if answer is None or not text:
        raise ValueError(f"{source}: the answer is {_short(answer)}; there is nothing to compare a completion with")
    names = record.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name and "\0" not in name for name in names):
        raise ValueError(f'{source}: "image" is {_short(names)}; a path, a list of paths, or no such key is expected')
    marks = question.count(IMAGE_MARK)
    if marks not in (0, len(names)):
        raise ValueError(f"{source}: {marks} {IMAGE_MARK} marks for {len(names)} images; mark each image once or none")
    reward, name = record.get("accu_reward_method", ""), str(record.get("id", source))
    if reward and not (isinstance(reward, str) and reward in VLM_R1_METHODS):
        raise ValueError(
            f'{source}: "accu_reward_method" {_short(reward)} is unknown: one of {", ".join(VLM_R1_METHODS)}'
        )
    try:
        "".join((name, question, text, *names)).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{source}: half a surrogate pair, {_short(error.object[error.start])}, is no text; write the character"
        ) from error
    images = tuple([os.path.join(root, name) for name in names])
    return Sample(
        id=name,
        question=question,
        answer=text,
        images=shared.setdefault(images, images),
        reward=VLM_R1_METHODS[reward] if reward else "",
        has_boxes=_holds_boxes(text, source, bare=has_boxes, reward=reward),
        source=source,
        root=inside,
        file=file,
    )


def _holds_boxes(answer: str, source: str, *, bare: bool, reward: str) -> bool:
    """Whether the truth holds boxes; refuses those that are none, and what would be read for a box but not be moved."""
    boxes = answer_boxes(answer, bare=bare)
    for box in boxes or ():
        if not (all(abs(side) < 1e9 for side in box) and box[0] < box[2] and box[1] < box[3]):
            raise ValueError(
                f"{source}: box {_short(box)} has swapped corners or no area; "
                "[x1, y1, x2, y2] with x1 < x2 and y1 < y2 is expected"
            )
    if boxes is None and ("bbox_2d" in answer or bare and not reward and _LISTED.search(answer)):
        raise ValueError(
            f"{source}: the answer {_short(answer)} seems to hold boxes and is none: [x1, y1, x2, y2] alone or a list "
            'of {"bbox_2d": [x1, y1, x2, y2], "label": ...} is expected; a text is for a reward that reads no boxes'
        )
    return boxes is not None


_LISTED = re.compile(r"[\[{]\s*[^\]}\s]")  # a bracket that holds something


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
    speakers = [turn.get("from") for turn in turns]
    if speakers[0] not in (None, "human", "user") or speakers[1] not in (None, "gpt", "assistant"):
        raise ValueError(f'{source}: the turns are "from" {_short(speakers)}; "human" asks first, then "gpt" answers')
    return turns[0]["value"], turns[1]["value"]


def answer_boxes(answer: str, *, bare: bool = True) -> list[list[float]] | None:
    """The boxes of a truth: one for "[x1, y1, x2, y2]", all of a list of {"bbox_2d": ...}; None if it holds none."""
    try:
        value = _TRUTH.decode(unfence(answer))
    except (ValueError, RecursionError):  # ValueError: no JSON, a key given twice, a number of 5,000 digits
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
    """Refuses missing images, paths out of their root, unreadable headers and boxes outside their image.

    In the order of the samples, with file, line, value and remedy. Costs a listing of each directory and MAX_HEADERS
    small reads, whatever the number of samples.
    """
    faults = _path_faults(samples)
    for sample in samples:
        if sample.has_boxes and not sample.images:
            raise ValueError(f"{sample.source}: a box without an image; name one, or choose rewards that read no boxes")
        for path in sample.images:
            if (path, sample.root) in faults:
                raise ValueError(f"{sample.source}: {_short(path)} {faults[path, sample.root]}")
    paths = list(dict.fromkeys(path for sample in samples for path in sample.images))
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


def _path_faults(samples: list[Sample]) -> dict[tuple[str, str], str]:
    """(path, root) -> what is wrong, of those that are no files or do not lie under their root."""
    wanted = {}
    for sample in samples:
        for path in sample.images:
            directory, _, name = path.rpartition("/")
            wanted.setdefault((directory, sample.root), set()).add(name)
    faults = {}
    for (directory, root), names in wanted.items():
        files, links = _list_files(directory, names)
        outside = not _lies_under(directory, root)
        for name in names:
            path = f"{directory}/{name}"
            if outside or (name in links and not _lies_under(path, root)):
                faults[path, root] = _OUTSIDE.format(root=root)
            elif name not in files:
                faults[path, root] = "is no file; check the image root and the name"
    return faults


_OUTSIDE = "leads out of the image root {root}; give the root it lies under, or ask for it with --allow_outside_root"


def _list_files(directory: str, names: set[str]) -> tuple[set[str], set[str]]:
    """Those of the names that are files in the directory, and those of them that are links."""
    # One listing instead of a question per file, which on a network disk is a round trip each.
    files, links = set(), set()
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name not in names:
                    continue
                if entry.is_symlink():
                    links.add(entry.name)
                if entry.is_file():
                    files.add(entry.name)
    except OSError:  # no such directory, a link to itself, a directory whose files may be opened and not listed
        return {name for name in names if os.path.isfile(os.path.join(directory, name))}, names
    return files, links


def _lies_under(path: str, root: str) -> bool:
    """Whether the file or directory that the path leads to, links followed, lies under that real path."""
    return not root or os.path.commonpath((os.path.realpath(path), root)) == root


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
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return _shown_size(image)
    except Exception as error:  # Pillow's plugins raise whatever broken bytes lead them into: OSError, KeyError, ...
        return f"{type(error).__name__}: {error}"


def _shown_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "TIFF":  # opening has turned it
        return image.size
    # getexif decodes a whole PNG in search of a block that may follow the pixels; opening has read what precedes them.
    before = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys()
    exif = image.getexif() if image.format != "PNG" or before else {}
    sideways = exif.get(0x0112) in (5, 6, 7, 8)  # orientations turned by a quarter
    return image.size[::-1] if sideways else image.size


def load_image(path: str, root: str = "") -> Image.Image:
    """The image as a viewer shows it, in RGB; BadSample if it does not decode or no longer lies under that root."""
    if root and not _lies_under(path, root):
        raise BadSample(f"{_short(path)} {_OUTSIDE.format(root=root)}")
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return _as_shown(image)
    except Exception as error:  # as above
        raise BadSample(f"{path} does not decode: {type(error).__name__}: {error}") from error


def _as_shown(image: Image.Image) -> Image.Image:
    """RGB: turned upright, the first frame, 16 bits scaled to 8, transparency on white."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = ImageOps.exif_transpose(image)
    if sixteen:  # convert() would cut off at 255, that is turn nearly everything white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode!r} has no white; save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    shown = Image.new("RGB", image.size, "white")
    shown.paste(layered, mask=layered.getchannel("A"))
    return shown


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
    return _shuffled(range(step * per_step, (step + 1) * per_step), num_samples, (seed,))


def mixed_indices(sizes: list[int], shares: list[float], per_step: int, step: int, seed: int) -> list[int]:
    """Indices of a step's samples, by file, among the samples of all files one after the other.

    Each file is shuffled and repeated by itself, as step_indices does it, and gives what share_out says.
    """
    before, after = (share_out(count * per_step, shares) for count in (step, step + 1))
    indices = []
    for file, size in enumerate(sizes):
        first = sum(sizes[:file])
        indices += [first + index for index in _shuffled(range(before[file], after[file]), size, (seed, file))]
    return indices


def share_out(total: int, shares: list[float]) -> list[int]:
    """Whole numbers that add up to the total, each next to its share of it (Sainte-Lague's rounding).

    A larger total takes from none, which largest remainders would: so the counts of a step, the difference of two
    totals, are a function of the step, and what one step rounds away the next ones give back.
    """
    # All differ from their quota by at most (files + 1) / 2, so the search may begin that far below it.
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
