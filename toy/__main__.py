"""How the toy's start is made: `python -m toy start DIRECTORY`, two runs of sft.py, `python -m toy ship CHECKPOINT`.

docs/toy.md has the commands between the two.
"""

import sys
from pathlib import Path

import torch

from model.vlm import load_model
from toy import FILES, MAX_PIXELS, MIN_PIXELS, MODEL, ensure_data
from toy.model import build_model, build_processor
from toy.scenes import Recipe, write_split

USAGE = """\
usage: python -m toy start DIRECTORY    write an untrained model and scenes with true and with loose boxes
       python -m toy ship CHECKPOINT    make a checkpoint the toy's start, in toy/weights/"""


def write_start(directory: Path) -> None:
    """Writes what the start is made from: an untrained model, scenes with true boxes and scenes with loose ones."""
    ensure_data([str(FILES["test"])])  # sft.py evaluates on it
    write_split(directory, "true", 24000, seed=10, recipe=Recipe(relations=0.05, fewest=1, questions=4))
    write_split(directory, "loose", 6000, seed=11, recipe=Recipe(relations=0.05, fewest=1, questions=4, loose=True))
    processor = build_processor()
    build_model(processor.tokenizer).save_pretrained(directory / "untrained")
    processor.save_pretrained(directory / "untrained")


def ship(checkpoint: Path, directory: Path = MODEL) -> None:
    """Writes a checkpoint as the start that the repository ships: in bf16, with nothing that loading does not need."""
    if not (checkpoint / "config.json").is_file():
        raise SystemExit(f"error: {checkpoint} is no checkpoint: it holds no config.json; give OUT/checkpoints/step-N")
    model, processor = load_model(str(checkpoint), dtype=torch.bfloat16, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def main(argv: list[str]) -> None:
    """Runs one of the two commands."""
    match argv:
        case ["start", directory]:
            write_start(Path(directory))
        case ["ship", checkpoint]:
            ship(Path(checkpoint))
        case _:
            raise SystemExit(USAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
