"""The memory that Qwen2.5-VL needs per GPU, by the estimate of --dry_run, for its sizes and several numbers of GPUs.

    python -m tools.memory --image_tokens 400

Nothing is allocated: models are built on the meta device. A cell is the larger of drawing and learning in GB, in
brackets with --draw_sharded, which draws from sharded layers.
"""

import argparse
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedConfig

from infra.config import TrainConfig
from infra.estimate import RowSize, memory_estimate
from infra.parallel import World
from tools.rehearse import build_model, model_config

GPUS = (1, 2, 4, 8, 16)
LARGE = {  # width, MLP, layers, heads and key heads, as published
    "32b": (5120, 27_648, 64, 40, 8),
    "72b": (8192, 29_568, 80, 64, 8),
}


def config_of(size: str) -> PreTrainedConfig:
    """The config of Qwen2.5-VL of that size."""
    if size not in LARGE:
        return model_config(size)
    config = model_config("7b")
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, heads, key_heads = LARGE[size]
    text.num_attention_heads, text.num_key_value_heads = heads, key_heads
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    config.vision_config.out_hidden_size = text.hidden_size
    config.vision_config.intermediate_size = 3456 if size == "32b" else 3420
    return config


def gigabytes(model: nn.Module, config: TrainConfig, row: RowSize, gpus: int, *, sharded: bool) -> float:
    """The peak of a step on one of so many GPUs."""
    mesh = {"shard": SimpleNamespace(size=lambda: gpus)}
    world = World(0, gpus, torch.device("cuda"), mesh, draw_sharded=sharded)
    reference = config.beta > 0 and not config.lora_rank
    phases = memory_estimate(model, world, config, reference=reference, row=row)
    return max(sum(terms.values()) for terms in phases.values())


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.memory", description="The memory that a run needs per GPU.")
    parser.add_argument("--image_tokens", type=int, default=400, help="tokens of a prompt's image (400)")
    parser.add_argument("--completion_tokens", type=int, default=2048, help="longest completion (2048)")
    parser.add_argument("--row_tokens", type=int, default=8192, help="tokens of a packed row (8192)")
    parser.add_argument("--sizes", nargs="+", default=["3b", "7b", "32b", "72b"], help="of Qwen2.5-VL (3b 7b 32b 72b)")
    options = parser.parse_args(argv)
    row = RowSize(options.row_tokens, prompts=3, image_tokens=3 * options.image_tokens)
    print(f"| Qwen2.5-VL | {' | '.join(map(str, GPUS))} |\n" + "|---" * (len(GPUS) + 1) + "|")
    for size in options.sizes:
        for rank, trained in ((0, "all weights"), (64, "`--lora_rank 64`")):
            config = TrainConfig(
                data="none", template="plain", dtype="bf16", gradient_checkpointing=True, lora_rank=rank,
                max_completion_tokens=options.completion_tokens,
            )  # fmt: skip
            model, cells = build_model(config_of(size), config, torch.device("meta"), trained=True), []
            for gpus in GPUS:
                whole, sharded = (gigabytes(model, config, row, gpus, sharded=way) for way in (False, True))
                cells.append(f"{whole:.0f}" if gpus == 1 else f"{whole:.0f} ({sharded:.0f})")
            print(f"| {size.upper()}, {trained} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
