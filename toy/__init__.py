"""A small world and a small model that train in minutes on two CPU cores: what `python train.py` runs by default.

`scenes.py` draws coloured shapes on a noisy ground and asks for exactly one of them; the answer is its box. Everything
else is the real thing in small (`model.py`): the class Qwen2_5_VLForConditionalGeneration, its image processor, a chat
template, a tokenizer, images and JSONL files in VLM-R1's format. So the toy takes every path that a 3B model takes.

`weights/` holds the start. SFT on loose boxes (every side pushed out by 5 to 45% of the object's size) taught it the
format and where the object is, but not where its edges are. Imitating loose boxes cannot tighten them; a reward
computed from the true box can. docs/toy.md tells the whole story. `detection/` holds a second start, which finds all
objects of the classes that a question asks for, and lists too many of those that are not there; `sizes/` holds starts
of other widths.

This file imports neither numpy nor torch, because the commands import it before they parse their options.
"""

from collections.abc import Iterable
from pathlib import Path

HOME = Path(__file__).resolve().parent
MODEL = HOME / "weights"
DATA = HOME / "data"
FILES = {name: DATA / f"{name}.jsonl" for name in ("train", "test", "pairs", "relations")}
DETECTION = HOME / "detection"
WIDTHS = {"0.3M": 64, "1.1M": 128, "4.3M": 256}  # of the decoder, by the number of parameters
STARTS = {"0.3M": HOME / "sizes" / "0.3M", "1.1M": MODEL, "4.3M": HOME / "sizes" / "4.3M"}
DETECTION_FILES = {name: DATA / f"detection_{name}.jsonl" for name in ("train", "easy", "test")}
RESPONSE = "<think>{question}</think><answer>{answer}</answer>"
AT_ONCE = " at once"  # a detection question that ends so gets an answer with an empty thought
MIN_PIXELS, MAX_PIXELS = 16 * 16, 256 * 256  # a scene of 64 x 64 keeps its size

# The options that each command takes if no --model is given; the commands' own defaults are VLM-R1's recipe.
_SHARED = {
    "model": str(MODEL),
    "image_root": str(DATA),
    "template": "plain",
    "max_completion_tokens": 24,  # an answer takes 16 to 21
    "min_pixels": MIN_PIXELS,
    "max_pixels": MAX_PIXELS,
}
_TRAINING = {
    **_SHARED,
    "data": str(FILES["train"]),
    "eval_data": [str(FILES[name]) for name in ("test", "pairs", "relations")],  # the first decides what is best
    "steps": 300,
    "learning_rate": 3e-4,
    "row_tokens": 400,
    "eval_batch_size": 64,
}
PRESETS = {
    # `format` pays only for an answer that ends; under `rec_format` the toy soon stops ending its answers.
    "train": {**_TRAINING, "beta": 0.0, "eval_every": 100, "rewards": ["iou", "format"]},
    "sft": {**_TRAINING, "response": RESPONSE},
    "eval": {**_SHARED, "data": [str(FILES["test"])], "batch_size": 64},
}

# What train.py takes for a detection run on the start in detection/, whose answers take up to 100 tokens.
DETECTION_OPTIONS = {
    **PRESETS["train"],
    "model": str(DETECTION),
    "data": str(DETECTION_FILES["train"]),
    "eval_data": [str(DETECTION_FILES["test"])],
    "prompts_per_step": 8,
    "max_completion_tokens": 100,
    "rewards": ["od_length", "format"],
}
AT_ONCE_TEMPLATE = "{question}" + AT_ONCE


def ensure_data(files: Iterable[str]) -> None:
    """Writes the toy's data if one of these data files belongs to it and is missing."""
    wanted = {Path(file).resolve() for file in files}
    missing, missing_detection = (
        [path for path in group.values() if path in wanted and not path.exists()] for group in (FILES, DETECTION_FILES)
    )
    if missing or missing_detection:
        from toy.scenes import write_data, write_detection_data  # here, since it takes numpy and Pillow

        if missing:
            write_data()
        if missing_detection:
            write_detection_data()
