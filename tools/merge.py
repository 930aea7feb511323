"""`python -m tools.merge CHECKPOINT OUT`: writes a base and its LoRA adapter as one model, for any other program."""

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

from infra.modelcheck import check_model
from model.lora import base_of, is_adapter, merge_adapters
from model.vlm import load_any


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
    model, processor = load_any(checkpoint, dtype=torch.float32)
    merge_adapters(model)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(AutoConfig.from_pretrained(base_of(checkpoint)).dtype or torch.float32).save_pretrained(partial)
    if not (source / "tokenizer_config.json").exists():  # PEFT saves no tokenizer
        processor.save_pretrained(partial)
    for path in source.iterdir():  # tokenizer, processor, chat template, evaluation.json
        if path.is_file() and not path.name.startswith(("adapter_", "state-", "trainer.json")):
            shutil.copyfile(path, partial / path.name)
    for path in partial.iterdir():
        path.chmod((source / "adapter_config.json").stat().st_mode)  # safetensors writes 0600
    partial.rename(target)


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: python -m tools.merge CHECKPOINT OUT", file=sys.stderr)
        return 2
    try:
        merge(*argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{argv[1]}: base and adapter in one model")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
