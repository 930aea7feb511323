"""How the toy's start is made: `python -m toy start DIRECTORY`, two runs of sft.py, `python -m toy ship CHECKPOINT`."""

import sys
from pathlib import Path

import torch

from model.vlm import load_model
from toy import MODEL
from toy.model import build_model, build_processor
from toy.scenes import write_data, write_split


def write_start(directory: Path) -> None:
    """What the start is made from: an untrained model, and scenes with true and with loose boxes."""
    write_data()  # its test split is what the making is watched on
    write_split(directory, "true", 24000, seed=10, relations=0.05, fewest=1, questions=4)
    write_split(directory, "loose", 6000, seed=11, relations=0.05, fewest=1, questions=4, loose=True)
    processor = build_processor()
    build_model(processor.tokenizer).save_pretrained(directory / "untrained")
    processor.save_pretrained(directory / "untrained")


def ship(checkpoint: Path, directory: Path = MODEL) -> None:
    """Writes a checkpoint as the start that the repository ships: bf16, and nothing but what loading needs."""
    model, processor = load_model(str(checkpoint), dtype=torch.bfloat16, min_pixels=16 * 16, max_pixels=256 * 256)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def main(argv: list[str]) -> None:
    commands = {"start": write_start, "ship": ship}
    if len(argv) != 2 or argv[0] not in commands:
        raise SystemExit(
            "usage: python -m toy start DIRECTORY    write there what the start is made from\n"
            "       python -m toy ship CHECKPOINT    make that checkpoint the start, in toy/weights/"
        )
    commands[argv[0]](Path(argv[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
