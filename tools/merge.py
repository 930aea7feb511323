"""`python -m tools.merge CHECKPOINT OUT`: writes a base and its LoRA adapter as one model, for any other program."""

import shutil
import sys
from pathlib import Path

import torch
from transformers.utils import cached_file

from infra.checkpoint import EVALUATION_FILE, SIDE_FILES
from infra.modelcheck import PROCESSOR_FILES, check_model
from model.lora import base_of, is_adapter, merge_adapters
from model.vlm import load_any, load_config


def merge(checkpoint: str, out: str) -> None:
    """Writes base plus adapter as a Hugging Face directory in the base's dtype; it is whole or not there."""
    source, target = Path(checkpoint), Path(out)
    if not is_adapter(checkpoint):
        raise ValueError(
            f"{source} has no adapter_config.json: give a checkpoint of a LoRA run, OUT/checkpoints/step-..."
        )
    if target.exists():
        raise ValueError(f"{target} exists: name a directory that does not")
    check_model(checkpoint)
    base = base_of(checkpoint)
    model, _ = load_any(checkpoint, dtype=torch.float32)
    merge_adapters(model)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(load_config(base).dtype or torch.float32).save_pretrained(partial)
    has_processor = any((source / name).is_file() for name in PROCESSOR_FILES)  # PEFT saves none
    copy_files(checkpoint if has_processor else base, partial)
    mode = (partial / "config.json").stat().st_mode
    for path in partial.iterdir():  # safetensors writes 0600, which colleagues on a shared disk cannot read
        path.chmod(mode)
    partial.rename(target)


def copy_files(model: str, directory: Path) -> None:
    """Copies the tokenizer, processor and chat template files of a model, and what its run evaluates under."""
    for name in (*SIDE_FILES, EVALUATION_FILE):
        path = cached_file(
            model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if path is not None:
            shutil.copyfile(path, directory / name)


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if len(argv) != 2:
        print("usage: python -m tools.merge CHECKPOINT OUT", file=sys.stderr)
        return 2
    try:
        merge(*argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{argv[1]}: base and adapter in one model")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
