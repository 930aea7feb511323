"""How the toy's starts are made: `python -m toy start DIRECTORY`, two runs of sft.py, `python -m toy ship CHECKPOINT`.

The detection start takes `python -m toy detect DIRECTORY CHECKPOINT` first. docs/toy.md has the commands in between.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from model.vlm import load_model
from toy import DETECTION, DETECTION_FILES, FILES, MAX_PIXELS, MIN_PIXELS, STARTS, WIDTHS, ensure_data
from toy.model import build_model, build_processor, with_detection_tokens
from toy.scenes import ClassRecipe, Recipe, write_detection_split, write_split

USAGE = """\
usage: python -m toy start DIRECTORY              write untrained models, and scenes with true and with loose boxes
       python -m toy detect DIRECTORY CHECKPOINT  write a grounding model with more tokens, and scenes for detection
       python -m toy ship CHECKPOINT NAME         make a checkpoint a start of the toy: 0.3M, 1.1M, 4.3M or detection"""

SHIPPED = {**STARTS, "detection": DETECTION}


def write_start(directory: Path) -> None:
    """Writes what starts are made from: untrained models of all sizes, scenes with true and with loose boxes."""
    ensure_data([str(FILES["test"])])  # sft.py evaluates on it
    write_split(directory, "true", 24000, seed=10, recipe=Recipe(relations=0.05, fewest=1, questions=4))
    write_split(directory, "loose", 6000, seed=11, recipe=Recipe(relations=0.05, fewest=1, questions=4, loose=True))
    processor = build_processor()
    for size, width in WIDTHS.items():
        build_model(processor.tokenizer, width=width).save_pretrained(directory / "untrained" / size)
        processor.save_pretrained(directory / "untrained" / size)


def write_detection_start(directory: Path, checkpoint: Path) -> None:
    """Writes what the detection start is made from: true and eager scenes, and a grounding model with more tokens."""
    ensure_data([str(DETECTION_FILES["test"])])  # sft.py evaluates on it
    recipe = ClassRecipe(questions=3, easy=0.4, thoughts=True)
    crowded = replace(recipe, fewest=2, most=4)
    write_detection_split(directory, "crowded", 12000, seed=20, recipe=crowded)
    write_detection_split(directory, "true", 8000, seed=20, recipe=recipe)
    write_detection_split(directory, "plenty", 24000, seed=22, recipe=replace(recipe, easy=0.3))
    write_detection_split(directory, "eager", 6000, seed=21, recipe=replace(recipe, easy=0.2, eager=True))
    processor = build_processor(detection=True)
    model, _ = load_checked(checkpoint)
    with_detection_tokens(model, processor.tokenizer).save_pretrained(directory / "grounding")
    processor.save_pretrained(directory / "grounding")


def ship(checkpoint: Path, directory: Path) -> None:
    """Writes a checkpoint as the start that the repository ships: in bf16, with nothing that loading does not need."""
    model, processor = load_checked(checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def load_checked(
    checkpoint: Path, dtype: torch.dtype = torch.float32
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The model and the processor of a checkpoint of the toy."""
    if not (checkpoint / "config.json").is_file():
        raise SystemExit(f"error: {checkpoint} is no checkpoint: it holds no config.json; give OUT/checkpoints/step-N")
    return load_model(str(checkpoint), dtype=dtype, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)


def main(argv: list[str]) -> None:
    """Runs one of the commands."""
    match argv:
        case ["start", directory]:
            write_start(Path(directory))
        case ["detect", directory, checkpoint]:
            write_detection_start(Path(directory), Path(checkpoint))
        case ["ship", checkpoint, name] if name in SHIPPED:
            ship(Path(checkpoint), SHIPPED[name])
        case _:
            raise SystemExit(USAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
