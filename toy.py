"""A VLM of a million parameters and a world it can learn to see on two CPU cores; the default of `python train.py`.

Scenes of coloured shapes on a noisy ground, questions that mean exactly one of them, boxes as truth. Everything is the
real thing, only small: the class Qwen2_5_VLForConditionalGeneration, its image processor, a chat template, a tokenizer,
images and JSONL on disk in VLM-R1's format. So the toy goes through the code a 3B model goes through.

`toy_model/` holds the start: taught by sft.py on boxes annotated loosely (every side pushed out by 5 to 45%), it
answers in format and finds the object but not its edges. Imitating loose boxes cannot tighten them; a reward computed
from the true box can.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlm import image_only, load_model

SIDE = 64  # pixels of a scene, both ways
COLOURS = {"red": (214, 40, 40), "green": (44, 160, 44), "blue": (40, 80, 220), "yellow": (235, 215, 40),
           "purple": (150, 60, 190), "orange": (245, 140, 20)}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": (10, 14), "large": (20, 28)}  # pixels a side
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
UNSEEN_PAIRS = frozenset({("red", "triangle"), ("blue", "circle"), ("yellow", "square")})  # kept for the split "pairs"
RESPONSE = "<think>{question}</think><answer>{answer}</answer>"
HOME = Path(__file__).parent
DATA = HOME / "toy_data"
MODEL = HOME / "toy_model"

# What the entry points take for defaults when no --model is given; their own are VLM-R1's recipe for real models.
_HELD_OUT = [
    str(DATA / f"{name}.jsonl") for name in ("test", "pairs", "relations")
]  # the first picks the best checkpoint
_SHARED = {"template": "plain", "max_completion_tokens": 24, "min_pixels": 16 * 16, "max_pixels": 256 * 256}
_TRAINING = {**_SHARED, "data": [str(DATA / "train.jsonl")], "image_root": [str(DATA)], "eval_data": _HELD_OUT,
             "eval_image_root": [str(DATA)], "row_tokens": "400", "eval_batch_size": 64}  # fmt: skip
PRESETS = {
    "train": {**_TRAINING, "steps": 300, "learning_rate": 3e-4, "beta": 0.0, "eval_every": 100},
    "sft": {**_TRAINING, "steps": 300, "learning_rate": 3e-4, "response": RESPONSE},
    "eval": {**_SHARED, "data": _HELD_OUT[:1], "image_root": [str(DATA)], "batch_size": 64},
}


@dataclass(frozen=True)
class Shape:
    colour: str
    shape: str
    size: str
    box: tuple[int, int, int, int]  # x1, y1, x2, y2: the pixels drawn are x1..x2-1

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


# ---- scenes --------------------------------------------------------------------------------------------------------


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


def write_start(directory: Path) -> None:
    """What the start is made from: an untrained model, and scenes with true and with loose boxes."""
    write_data()  # its test split is what the making is watched on
    write_split(directory, "true", 24000, seed=10, relations=0.05, fewest=1, questions=4)
    write_split(directory, "loose", 6000, seed=11, relations=0.05, fewest=1, questions=4, loose=True)
    processor = build_processor()
    build_model(processor.tokenizer).save_pretrained(directory / "untrained")
    processor.save_pretrained(directory / "untrained")


# ---- the model -----------------------------------------------------------------------------------------------------

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PIECES = ["<think>", "</think>", "<answer>", "</answer>", '{"bbox_2d": [', "]}", ", "]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word (its leading space included), per number to 64 and per tag; any other text by characters."""
    words = ["the", "user", "assistant", *SIZES, *COLOURS, *SHAPES, *(w for r in RELATIONS for w in r.split())]
    pieces = [*SPECIAL, "<unk>", *PIECES, *(form for word in dict.fromkeys(words) for form in (word, f" {word}")),
              *(str(number) for number in range(SIDE + 1)), "\n", *map(chr, range(32, 127))]  # fmt: skip
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tags = "|".join("".join(f"\\{c}" if not c.isalnum() else c for c in piece) for piece in PIECES)
    names = "|".join(sorted(dict.fromkeys(words), key=len, reverse=True))
    # A word counts only where it ends, so that "these" is not "the" and two letters; likewise a number.
    pattern = rf"{tags}| ?(?:{names})(?![a-z])|(?:6[0-4]|[1-5]?[0-9])(?![0-9])|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>",
        additional_special_tokens=SPECIAL[1:2] + SPECIAL[3:], padding_side="left", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def build_processor() -> Qwen2_5_VLProcessor:
    """Qwen's processor with patches of 8 x 8 pixels, merged by 2: a scene is 16 image tokens."""
    images = Qwen2VLImageProcessorPil(
        patch_size=8, temporal_patch_size=2, merge_size=2, min_pixels=16 * 16, max_pixels=256 * 256
    )
    return image_only(Qwen2_5_VLProcessor)(images, build_tokenizer(), chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained Qwen2.5-VL of 1.1 million parameters: 4 decoder layers of 128, 2 vision blocks of 96."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    rope = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 7, 7]}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096,
            "rope_parameters": rope, "initializer_range": 0.05, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2, "hidden_size": 96, "num_heads": 4, "intermediate_size": 192, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": SIDE, "out_hidden_size": 128,
            "fullatt_block_indexes": [0, 1], "initializer_range": 0.05,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def ship(checkpoint: Path, directory: Path = MODEL) -> None:
    """Writes a checkpoint as the start that the repository ships: bf16, and nothing but what loading needs."""
    model, processor = load_model(str(checkpoint), dtype=torch.bfloat16, min_pixels=16 * 16, max_pixels=256 * 256)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def main(argv: list[str]) -> None:
    commands = {"start": write_start, "ship": ship}
    if len(argv) != 2 or argv[0] not in commands:
        raise SystemExit(
            "usage: python toy.py start DIRECTORY    write there what the start is made from\n"
            "       python toy.py ship CHECKPOINT    make that checkpoint the start, in toy_model/"
        )
    commands[argv[0]](Path(argv[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
