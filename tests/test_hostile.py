"""Hostile and broken data on the whole way to a prompt: each file is used, refused at the start, or set aside.

A used file must give the prompt that a plain PNG of what a viewer shows gives: the same pixels, the same box. So no
file leads to a wrong training step. Files are written in their real formats, by hand where Pillow cannot.
"""

import gzip
import json
import os
import struct
import zlib
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers import ALONE
from PIL import Image

import data
import eval as evaluation
import toy
import toy.model
from data import BadSample, Sample, check_samples, load_image, read_samples
from infra.config import EvalConfig, TrainConfig
from infra.prompts import PromptFeed, load_run_samples
from model.vlm import build_prompt, check_special_tokens

BOX = [8, 8, 24, 24]
RED, BLUE, WHITE = (220, 30, 30), (30, 60, 200), (255, 255, 255)


def scene(ground=BLUE, red=RED):
    """48 x 32 pixels, the red square at BOX: turning or mirroring it moves the square."""
    image = np.full((32, 48, 3), ground, np.uint8)
    image[8:24, 8:24] = red
    return image


def grey_scene():
    return scene((40,) * 3, (200,) * 3)


def record(answer=BOX, question="<image>the red square", image="plain.png", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "target", "image": image, "conversations": turns, **more}


def line(*arguments, **named):
    return json.dumps(record(*arguments, **named)).encode()


GOOD = json.dumps(record() | {"id": "good"}).encode()


@dataclass(frozen=True)
class Case:
    outcome: str  # "used", "refused" before the run with file and line, or "set aside" by it
    reason: str = ""  # what the message must say
    file: bytes | None = None  # the whole data file; a good line, then `second`, without one
    second: bytes = line()
    image: object = None  # writes image.bin, given its path
    shown: object = scene  # what a viewer shows of it
    box: tuple = tuple(BOX)  # in what is shown
    question: str = "the red square"
    place: str = ":2"
    name: str = "train.jsonl"
    setup: object = None  # given the image root
    later: object = None  # happens after the start
    allow: bool = False


def refused(reason, **named):
    return Case("refused", reason, **named)


def picture(write, outcome="used", reason="", box=tuple(BOX), **named):
    return Case(outcome, reason, second=line(list(box), image="image.bin"), image=write, box=box, **named)


def saved(format, pixels=scene, mode="RGB", **options):
    """Writes such a picture with Pillow."""
    return lambda path: Image.fromarray(pixels()).convert(mode).save(path, format, **options)


def noise(format):
    return lambda path: Image.effect_noise((48, 32), 90).save(path, format)


def cut(write, share):
    """Writes the picture and keeps that share of its bytes."""

    def write_part(path):
        write(path)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: int(len(whole) * share)])

    return write_part


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, bits, colour, content, *chunks):
    """A PNG by hand."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(content)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def colour_16_bit(path):
    high = scene().astype(">u2") * 257
    Path(path).write_bytes(png(48, 32, 16, 2, b"".join(b"\0" + row.tobytes() for row in high)))


def grey_16_bit(format):
    return lambda path: Image.fromarray(grey_scene()[..., 0].astype(np.uint16) * 257).save(path, format)


def pgm_16_bit(path):
    Path(path).write_bytes(b"P5 48 32 65535\n" + (grey_scene()[..., 0].astype(">u2") * 257).tobytes())


def see_through(mode, format, ground=(10, 10, 10), **options):
    """The square on a ground that is transparent and of another colour underneath, so that ignoring alpha shows."""

    def write(path):
        alpha = np.zeros((32, 48, 1), np.uint8)
        alpha[8:24, 8:24] = 255
        pixels = scene(ground) if mode != "LA" else scene(ground, (200,) * 3)
        image = Image.fromarray(np.concatenate([pixels, alpha], 2))
        image = image.quantize(4) if mode == "P" else image.convert(mode)
        image.save(path, format, **options)

    return write


def palette_with_transparency(path):
    image = Image.fromarray(scene((10, 10, 10))).quantize(2)
    image.save(path, "PNG", transparency=image.getpixel((0, 0)))


def colour_key(path):
    Image.fromarray(scene((10, 10, 10))).save(path, "PNG", transparency=(10, 10, 10))


def animated(format):
    other = Image.new("RGB", (48, 32), (20, 200, 20))
    return saved(format, save_all=True, append_images=[other], duration=100, loop=0)


def stored(orientation):
    """The scene as a camera stores it, by the standard's words: which side the 0th row and the 0th column show."""
    v = scene()
    upright = {1: v, 2: v[:, ::-1], 3: v[::-1, ::-1], 4: v[::-1]}
    sideways = {5: v, 6: v[:, ::-1], 7: v[::-1, ::-1], 8: v[::-1]}
    turned = upright | {number: image.transpose(1, 0, 2) for number, image in sideways.items()}
    return np.ascontiguousarray(turned.get(orientation, v))


def photo(orientation, format="JPEG", **options):
    def write(path):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored(orientation)).save(path, format, exif=exif, **options)

    return write


def broken_exif(path):
    Image.fromarray(scene()).save(path, "JPEG", quality=95, exif=b"Exif\0\0this is no TIFF header")


def wrong_checksum(path):
    whole = bytearray(png(48, 32, 8, 2, b"".join(b"\0" + row.tobytes() for row in scene())))
    whole[-20] ^= 255
    Path(path).write_bytes(bytes(whole))


def text_bomb(path):
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 80_000_000))
    Path(path).write_bytes(png(48, 32, 8, 2, b"", bomb))


def inside_out(link):
    """A directory beside the root with a good picture, and what `link` makes in the root."""

    def setup(root):
        elsewhere = root.parent / "elsewhere"
        elsewhere.mkdir()
        Image.fromarray(scene()).save(elsewhere / "plain.png")
        (root / "sub").mkdir()
        link(root, elsewhere)

    return setup


def nothing(root, elsewhere):
    pass


def link_to_file(root, elsewhere):
    (root / "link.png").symlink_to(elsewhere / "plain.png")


def link_to_directory(root, elsewhere):
    (root / "link").symlink_to(elsewhere)


def swapped_for_a_link(root):
    (root / "image.bin").unlink()
    (root.parent / "secret.png").write_bytes((root / "plain.png").read_bytes())
    (root / "image.bin").symlink_to(root.parent / "secret.png")


DEEP = b'{"a":' * 100_000
TURNS = json.dumps(record()["conversations"]).encode()
PIXELS = {"quality": 95, "subsampling": 0}  # of a JPEG that keeps edges
ELSEWHERE = "../elsewhere/plain.png"

FILES = {
    "byte order mark": Case("used", file=b"\xef\xbb\xbf" + GOOD + b"\n" + line() + b"\n"),
    "windows line ends": Case("used", file=GOOD + b"\r\n" + line() + b"\r\n"),
    "blank lines": Case("used", file=b"\n \t\n" + GOOD + b"\n\n\r\n" + line() + b"\n\n"),
    "no newline at the end": Case("used", file=GOOD + b"\n" + line()),
    "line separators in a text": Case("used", question="a\u2028b\x85c", second=json.dumps(
        record(question="<image>a\u2028b\x85c"), ensure_ascii=False).encode()),
    "an emoji in two escapes": Case("used", second=line(question="<image>the \U0001f600"), question="the \U0001f600"),
    "a list in a .json file": Case("used", file=b"[" + GOOD + b",\n " + line() + b" ]\n", name="train.json"),
    "a list in a .jsonl file": Case("used", file=b"\xef\xbb\xbf\n [" + GOOD + b"," + line() + b"]"),
    "lines in a .json file": Case("used", file=GOOD + b"\n" + line(), name="train.json"),
    "a long list on one line": Case("used", file=b"[" + b",".join(
        [line(id="good", note="x" * 600_000), line(id="good", note="x" * 600_000), line()]) + b"]"),
    "latin-1": refused("not UTF-8 at byte", second=line().replace(b"red", b"r\xe9d")),
    "utf-16": refused("not UTF-8 at byte 0", file=(GOOD + b"\n").decode().encode("utf-16"), place=":1"),
    "gzip": refused("not UTF-8", file=gzip.compress(GOOD), place=":1"),
    "a line of 10 MB": refused("more than 1,000,000 bytes", second=line(question="<image>" + "x" * 10_000_000)),
    "a line of 10 MB without an end": refused("more than 1,000,000 bytes", file=b'"' + b"x" * 10_000_000, place=":1"),
    "10 MB in a list": refused("more than 1,000,000", file=b"[" + GOOD + b"," + line(question="x" * 10_000_000) + b"]",
                              place=", item 2"),
    "a key given twice": refused("two values for the key 'image'", second=b'{"image": "a.png", ' + line()[1:]),
    "a key given twice within": refused("two values for the key 'value'", second=line().replace(
        b'"value"', b'"value": "x", "value"', 1)),
    "a key given twice in a list": refused(
        "two values for the key 'a' in {'a': 2}", file=b"[" + GOOD + b',{"a": 1, "a": 2}]', place=""),
    "NaN": refused("NaN is not a number", second=line(weight=float("nan"))),
    "infinity": refused("-Infinity is not a number", second=line(weight=float("-inf"))),
    "deep nesting": refused("not JSON", second=DEEP),
    "deep nesting in a list": refused("not JSON", file=b"[" + GOOD + b"," + DEEP + b"]", place=""),
    "a number of 5,000 digits": refused("not JSON", second=b'{"id": ' + b"9" * 5000 + b"," + line()[1:]),
    "a line cut short": refused("not JSON", second=line()[:60]),
    "two objects on a line": refused("Extra data", second=line() + line()),
    "a list without an end": refused("not JSON", file=b"[" + GOOD + b"," + line(), place=""),
    "python's quotes": refused("not JSON", second=repr(record()).encode()),
    "old Mac line ends": refused("Extra data", file=GOOD + b"\r" + line(), place=":1"),
    "one object in a .json file": refused("holds one object", file=line(), name="train.json", place=""),
    "a text in a list": refused("a str where an object", file=b"[" + GOOD + b',"hello"]', place=", item 2"),
    "a pretty-printed object": refused("not JSON", file=json.dumps(record(), indent=1).encode(), place=":1"),
    "nothing": refused("holds no sample", file=b"", place=""),
    "a mark and blanks": refused("holds no sample", file=b"\xef\xbb\xbf\n\n", place=""),
    "an empty list": refused("holds no sample", file=b"[]", place=""),
    "a text for an object": refused("a str where an object", second=b'"hello"'),
    "null for an object": refused("a NoneType where an object", second=b"null"),
    "half a surrogate pair": refused("surrogates not allowed", second=line(question="<image>\ud83d")),
    "half a surrogate pair in a name": refused("surrogates not allowed", second=line(image="a\udc00.png")),
}  # fmt: skip

RECORDS = {
    "no question": refused("the question is ' '", second=line(question=" ")),
    "a null question": refused("the question is None", second=line(question=None)),
    "a null answer": refused("the answer is None", second=line(None)),
    "an empty answer": refused("the answer is", second=line("<answer> </answer>")),
    "turns that are a text": refused("conversations", second=b'{"conversations": "hello"}'),
    "a turn without a value": refused("conversations", second=line().replace(b'"value"', b'"text"')),
    "the speakers swapped": refused("human", second=line().replace(b"human", b"x").replace(b"gpt", b"human")),
    "a question for an answer": refused("human", second=line().replace(b"gpt", b"human")),
    "a system turn for a question": refused("a system message", second=line().replace(b"human", b"system")),
    "an image that is a number": refused('"image" is 3', second=line(image=3)),
    "a null image": refused('"image" is None', second=line(image=None)),
    "an image in a list that is none": refused('"image"', second=line(image=["plain.png", 3])),
    "more marks than images": refused("2 <image> marks", second=line(question="<image><image>x")),
    "a mark without an image": refused("1 <image> marks", second=b'{"conversations": ' + TURNS + b"}"),
    "a method that is an empty list": Case("used", second=line(accu_reward_method=[])),
    "a method that is a list": refused("accu_reward_method", second=line(accu_reward_method=["mcq"])),
    "an unknown method": refused("accu_reward_method", second=line(accu_reward_method="m" * 10_000)),
    "a box of swapped corners": refused("swapped", second=line([24, 8, 8, 24])),
    "a box without area": refused("no area", second=line([8, 8, 8, 24])),
    "a box of NaN": refused("no area", second=line("[8, 8, NaN, 24]")),
    "an infinite box": refused("no area", second=line("[8, 8, 1e999, 24]")),
    "a box of 400 digits": refused("no area", second=line("[8, 8, " + "9" * 400 + ", 24]")),
    "a box of 5,000 digits": refused("seems to hold boxes", second=line("[8, 8, " + "9" * 5000 + ", 24]")),
    "a box outside its image": refused("leaves its image of 48 x 32", second=line([8, 8, 60, 24])),
    "a negative box": refused("leaves its image", second=line([-8, 8, 24, 24])),
    "a box of three numbers": refused("seems to hold boxes", second=line([8, 8, 24])),
    "a box of texts": refused("seems to hold boxes", second=line(["8", "8", "24", "24"])),
    "a box of booleans": refused("seems to hold boxes", second=line([True, 8, 24, 24])),
    "a box in a sentence": refused("seems to hold boxes", second=line("It is at [8, 8, 24, 24].")),
    "one bad box among good ones": refused("seems to hold boxes", second=line(
        '[{"bbox_2d": [8, 8, 24, 24], "label": "a"}, {"bbox_2d": [8, 8, 24], "label": "b"}]')),
    "a bad box under a method of its own": refused("seems to hold boxes", second=line(
        '[{"bbox_2d": [8, 8, 24], "label": "b"}]', accu_reward_method="odLength")),
    "two boxes for one key": refused(
        "seems to hold boxes", second=line('{"bbox_2d": [8, 8, 24, 24], "bbox_2d": [1, 2, 3, 4]}')),
    "an answer nested deeply": refused("seems to hold boxes", second=line("[" * 100_000)),
    "a box without an image": refused("box without an image", second=b'{"problem": "x", "solution": [1, 2, 3, 4]}'),
    "a pixel beyond the border": Case("used", second=line([8, 8, 49, 33]), box=(8, 8, 49, 33)),
    "a control character": Case("used", second=line(question="<image>a\0b"), question="a\0b"),
    "a special token in a question": refused("spells <|im_end|>", second=line(question="<image>a <|im_end|> b")),
    "a special token in an answer": refused("spells <|image_pad|>", second=line("a <|image_pad|>")),
    "a special token in a key that is not ours": Case("used", second=line(note="<|im_end|>")),
    "template syntax": Case("used", second=line(question="<image>{{ 7 * 7 }} {question} {% raw %}"),
                            question="{{ 7 * 7 }} {question} {% raw %}"),
}  # fmt: skip

PATHS = {
    "out of the root by ..": refused("leads out of", second=line(image=ELSEWHERE), setup=inside_out(nothing)),
    "out by .. within": refused("leads out of", second=line(image="sub/../" + ELSEWHERE), setup=inside_out(nothing)),
    "out by .. and asked for": Case("used", second=line(image=ELSEWHERE), setup=inside_out(nothing), allow=True),
    ".. that stays inside": Case("used", second=line(image="sub/../plain.png"), setup=inside_out(nothing)),
    "a link to a file outside": refused("leads out of", second=line(image="link.png"), setup=inside_out(link_to_file)),
    "that link, asked for": Case("used", second=line(image="link.png"), setup=inside_out(link_to_file), allow=True),
    "a link to a directory outside": refused(
        "leads out of", second=line(image="link/plain.png"), setup=inside_out(link_to_directory)),
    ".. through a link": refused(
        "leads out of", second=line(image="link/../elsewhere/plain.png"), setup=inside_out(link_to_directory)),
    "a link that stays inside": Case("used", second=line(image="in.png"),
                                     setup=lambda root: (root / "in.png").symlink_to("plain.png")),
    "a link to itself": refused("leads out of|is no file", second=line(image="loop.png"),
                                setup=lambda root: (root / "loop.png").symlink_to("loop.png")),
    "a link to nothing": refused("is no file", second=line(image="gone.png"),
                                 setup=lambda root: (root / "gone.png").symlink_to("nowhere.png")),
    "an absolute path": refused("leads out of", second=line(image="/etc/hostname")),
    "no such file": refused("is no file", second=line(image="gone.png")),
    "a directory": refused("is no file", second=line(image="sub"), setup=lambda root: (root / "sub").mkdir()),
    "a directory with a slash": refused("is no file", second=line(image="plain.png/")),
    "a pipe": refused("is no file", second=line(image="pipe"), setup=lambda root: os.mkfifo(root / "pipe")),
    "a device": refused("is no file", second=line(image="/dev/zero"), allow=True),
    "a name with a zero byte": refused('"image" is', second=line(image="plain.png\0.jpg")),
    "a name of 5,000 letters": refused("is no file", second=line(image="x" * 5000 + "/y.png")),
    "an address": refused("is no file", second=line(image="https://example.org/a.png")),
    "an image written out": refused("is no file", second=line(image="data:image/png;base64," + "A" * 5000)),
    "deleted after the start": picture(saved("PNG"), "set aside", "No such file", later=lambda root: os.unlink(
        root / "image.bin")),
    "swapped for a link after the start": picture(saved("PNG"), "set aside", "leads out of", later=swapped_for_a_link),
}  # fmt: skip

IMAGES = {
    "png in .bin": picture(saved("PNG")),
    "jpeg": picture(saved("JPEG", **PIXELS)),
    "progressive jpeg": picture(saved("JPEG", progressive=True, **PIXELS)),
    "webp": picture(saved("WEBP", lossless=True)),
    "bmp": picture(saved("BMP")),
    "tiff": picture(saved("TIFF")),
    "jpeg 2000": picture(saved("JPEG2000")),
    "png that calls itself jpeg": Case("used", second=line(image="a.jpg"),
                                       setup=lambda root: saved("PNG")(root / "a.jpg")),
    "garbage after the end": picture(lambda path: (saved("PNG")(path), open(path, "ab").write(b"<?php 1 ?>" * 99))),
    "grey": picture(saved("PNG", grey_scene, "L"), shown=grey_scene),
    "one bit": picture(saved("PNG", lambda: scene((0, 0, 0), WHITE), "1"), shown=lambda: scene((0, 0, 0), WHITE)),
    "cmyk jpeg": picture(saved("JPEG", mode="CMYK", **PIXELS)),
    "cmyk tiff": picture(saved("TIFF", mode="CMYK")),
    "16-bit grey png": picture(grey_16_bit("PNG"), shown=grey_scene),
    "16-bit grey tiff": picture(grey_16_bit("TIFF"), shown=grey_scene),
    "16-bit grey pgm": picture(pgm_16_bit, shown=grey_scene),
    "16-bit colour png": picture(colour_16_bit),
    "floats": picture(saved("TIFF", mode="F"), "set aside", "does not say what white is"),
    "32-bit integers": picture(saved("TIFF", mode="I"), "set aside", "does not say what white is"),
    "alpha": picture(see_through("RGBA", "PNG"), shown=lambda: scene(WHITE)),
    "alpha webp": picture(see_through("RGBA", "WEBP", lossless=True), shown=lambda: scene(WHITE)),
    "grey with alpha": picture(see_through("LA", "PNG"), shown=lambda: scene(WHITE, (200,) * 3)),
    "palette with transparency": picture(palette_with_transparency, shown=lambda: scene(WHITE)),
    "palette of transparencies": picture(see_through("P", "PNG"), shown=lambda: scene(WHITE)),
    "gif with transparency": picture(see_through("RGBA", "GIF"), shown=lambda: scene(WHITE)),
    "one colour transparent": picture(colour_key, shown=lambda: scene(WHITE)),
    "animated gif": picture(animated("GIF")),
    "animated webp": picture(animated("WEBP")),
    "animated png": picture(animated("PNG")),
    "tiff of two pages": picture(animated("TIFF")),
    **{f"exif orientation {o}": picture(photo(o, **PIXELS)) for o in range(1, 9)},
    "a wide box in a sideways photo": picture(photo(6, **PIXELS), box=(8, 8, 48, 24)),
    "sideways png": picture(photo(6, "PNG")),
    "sideways webp": picture(photo(8, "WEBP", lossless=True)),
    "sideways tiff": picture(photo(6, "TIFF"), box=(8, 8, 48, 24)),
    "mirrored tiff": picture(photo(5, "TIFF"), box=(8, 8, 48, 24)),
    "exif orientation 99": picture(photo(99, **PIXELS)),
    "broken exif": picture(broken_exif),
    "1 x 1": picture(lambda path: Image.new("RGB", (1, 1), RED).save(path, "PNG"), box=(0, 0, 1, 1),
                     shown=lambda: np.full((1, 1, 3), RED, np.uint8)),
    "20,000 x 10": picture(lambda path: Image.new("L", (20_000, 10)).save(path, "PNG"), "set aside", "aspect ratio",
                           box=(0, 0, 99, 9)),
    "zero bytes": picture(lambda path: Path(path).touch(), "refused", "is no image"),
    "a text": picture(lambda path: Path(path).write_text("not a picture"), "refused", "is no image"),
    "a web page": picture(lambda path: Path(path).write_text("<html>404"), "refused", "is no image"),
    "svg": picture(lambda path: Path(path).write_text("<svg width='48' height='32'/>"), "refused", "is no image"),
    "eps, which runs an interpreter": picture(saved("EPS"), "refused", "is no image"),
    "200 megapixels": picture(lambda path: Path(path).write_bytes(png(20_000, 10_000, 1, 0, b"")), "refused", "bomb"),
    "a text of 80 MB in a png": picture(text_bomb, "refused", "is no image"),
    "a header alone": picture(cut(saved("PNG"), 0.2), "refused", "is no image"),
    "half a png": picture(cut(noise("PNG"), 0.6), "set aside", "decode"),
    "half a jpeg": picture(cut(saved("JPEG", **PIXELS), 0.9), "set aside", "truncated"),
    "half a gif": picture(cut(noise("GIF"), 0.6), "set aside", "decode"),
    "half a webp": picture(cut(saved("WEBP", lossless=True), 0.5), "refused", "is no image"),
    "a wrong checksum": picture(wrong_checksum, "set aside", "decode"),
}  # fmt: skip


CASES = {**FILES, **RECORDS, **PATHS, **IMAGES}


@pytest.fixture(scope="module")
def processor():
    return toy.model.build_processor()


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_used_refused_or_set_aside_and_never_taken_for_another(name, processor, tmp_path):
    case, root = CASES[name], tmp_path / "images"
    root.mkdir()
    Image.fromarray(scene()).save(root / "plain.png")
    if case.image:
        case.image(root / "image.bin")
    if case.setup:
        case.setup(root)
    path = tmp_path / case.name
    path.write_bytes(case.file if case.file is not None else GOOD + b"\n" + case.second + b"\n")
    outcome, message, prompt = outcome_of(case, path, root, processor)
    assert outcome == case.outcome, message
    assert any(reason in message for reason in case.reason.split("|")) and len(message) < 1000, message
    if outcome == "refused":
        assert message.startswith(f"{path}{case.place}: ")
    elif outcome == "set aside":
        assert prompt is None and f"{path}:2" in (tmp_path / "bad.jsonl").read_text()
    else:
        same_as_plain(case, prompt, tmp_path, processor)


def outcome_of(case, path, root, processor):
    """(outcome, message, the target's prompt), by the functions that a run calls."""
    try:
        samples = read_samples(path, root, allow_outside_root=case.allow)
        check_samples(samples)
        check_special_tokens(processor, samples)
    except ValueError as error:
        return "refused", str(error), None
    if case.later:
        case.later(root)
    config = TrainConfig(data="unused", template="plain", prompts_per_step=len(samples))
    feed = PromptFeed(samples, processor, config, ALONE, path.with_name("bad.jsonl"))
    prompts = feed.take(0, last=True)
    assert len(prompts) == len(samples) and all(p.sample.id == "good" for p in prompts if p.sample.id != "target")
    [prompt] = [p for p in prompts if p.sample.id == "target"] or [None]
    return ("set aside" if feed.broken else "used"), "".join(feed.broken.values()), prompt


def same_as_plain(case, prompt, directory, processor):
    """The prompt is the one that a plain picture of what is shown, asked the same in the plainest file, gives."""
    Image.fromarray(case.shown()).save(directory / "shown.png")
    sample = Sample("t", case.question, json.dumps(case.box), (str(directory / "shown.png"),), "", True, "here")
    plain = build_prompt(processor, sample, template="plain")
    assert prompt["input_ids"].equal(plain["input_ids"]) and prompt["image_grid_thw"].equal(plain["image_grid_thw"])
    assert json.loads(prompt.answer) == json.loads(plain.answer) and prompt.image_size == plain.image_size
    gap = (prompt["pixel_values"] - plain["pixel_values"]).abs()
    assert gap.mean() < 0.1 and gap.quantile(0.9) < 0.2  # of values from -1.8 to 2.1; a JPEG's edges are softer
    assert plain["pixel_values"].any() and prompt.sample.id == "target"


def test_the_table_of_hostile_files_is_as_long_as_promised():
    assert len(CASES) >= 60 and {case.outcome for case in CASES.values()} >= {"used", "refused", "set aside"}


def test_a_root_that_is_itself_a_link_is_a_root(tmp_path):
    (tmp_path / "real").mkdir()
    Image.fromarray(scene()).save(tmp_path / "real" / "plain.png")
    (tmp_path / "root").symlink_to("real")
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    absolute = json.dumps(record(image=str(tmp_path / "real" / "plain.png"))).encode()
    (tmp_path / "absolute.jsonl").write_bytes(absolute)  # an absolute path that leads into the root is no way out
    for name in ("train.jsonl", "absolute.jsonl"):
        [sample] = read_samples(tmp_path / name, tmp_path / "root")
        check_samples([sample])
        assert load_image(sample.images[0], sample.root).size == (48, 32)


def test_train_and_eval_pass_on_that_images_outside_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    Image.fromarray(scene()).save(tmp_path / "plain.png")
    path = tmp_path / "train.jsonl"
    path.write_bytes(line(image="../plain.png"))
    root, reached = str(tmp_path / "images"), []
    monkeypatch.setattr(evaluation, "load_any", lambda *names, **named: reached.append(1) or 1 / 0)
    train = TrainConfig(data=str(path), image_root=root)
    test = EvalConfig(data=[str(path)], image_root=root)
    targets = [evaluation.Target("train", str(path), root, "plain", "iou")]
    with pytest.raises(ValueError, match="--allow_outside_root"):
        load_run_samples(train, ALONE)
    with pytest.raises(ValueError, match="--allow_outside_root"):
        evaluation.answer(test, targets, ALONE)
    assert not reached
    assert len(load_run_samples(replace(train, allow_outside_root=True), ALONE).training) == 1
    with pytest.raises(ZeroDivisionError):
        evaluation.answer(replace(test, allow_outside_root=True), targets, ALONE)


def test_header_and_pixels_agree_on_the_size_of_every_picture(tmp_path):
    for name, case in IMAGES.items():
        if case.outcome == "used" and case.image:
            case.image(tmp_path / "image.bin")
            assert data._header_size(str(tmp_path / "image.bin")) == load_image(str(tmp_path / "image.bin")).size, name


@pytest.mark.filterwarnings("ignore")  # Pillow's, about tags
def test_damaged_bytes_raise_nothing_but_a_bad_sample(tmp_path):
    rng, path, sound = np.random.default_rng(0), tmp_path / "damaged", 0
    for write in (saved("PNG"), photo(6, **PIXELS), photo(6, "TIFF"), photo(3, "WEBP"), animated("GIF"), saved("BMP")):
        write(path)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(0, min(len(whole), 400), 6)] = rng.integers(0, 256, 6)
            path.write_bytes(damaged.tobytes())
            assert isinstance(data._header_size(str(path)), str | tuple)
            try:
                sound += load_image(str(path)).mode == "RGB"
            except BadSample as error:
                assert "does not decode" in str(error)
    assert 20 < sound < 340


def test_bytes_of_a_png_written_by_hand_are_read_as_meant():
    content = b"".join(b"\0" + row.tobytes() for row in scene())
    assert np.array_equal(np.asarray(Image.open(BytesIO(png(48, 32, 8, 2, content)))), scene())
