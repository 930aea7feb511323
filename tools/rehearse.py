"""A training step of Qwen2.5-VL at its true size, on a GPU that is not there (tools/fakecuda.py).

    python -m tools.rehearse 3b --gpus 8 --gradient_checkpointing

One rank draws the last tokens of its completions and takes a learning step on two packed rows, as train.py does. The
tables say what that asks of a GPU: kernels, waits of the host, floating-point operations, bytes, and the peak of the
memory beside the estimate of infra/estimate.py. Sizes of tensors are exact. Kernels are an estimate: most operators
launch one, the others are listed in KERNELS.
Left out: seconds, and everything that tools/fakecuda.py leaves out.

Shapes: B prompts of this rank, G completions of each, P prompt tokens, C tokens of a completion.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.utils import logging

import train
from data import Sample
from infra.config import TrainConfig
from infra.estimate import RowSize, memory_estimate
from infra.optim import apply_gradients, clip_gradients, make_optimizers
from infra.parallel import World, drawing, shard_model
from infra.policy import put_adapters
from infra.run import Run
from model.packing import pack_row
from model.vlm import Prompt, checkpoint_activations, trainable, use_own_layers
from rollout import (
    ON_GPU,
    Decoding,
    decode_step,
    decoding_forward,
    next_logits,
    pick_tokens,
    prefill,
    root_forward,
    see_images,
    tower_is_frozen,
)
from tools.bench_inputs import WORKLOADS, Workload, build_config
from tools.costs import Cost, Meter
from tools.fakecuda import CUDA, FakeCuda

WORDS = 22  # tokens of a prompt beside those of its image


@dataclass(frozen=True)
class Case:
    """What is rehearsed."""

    size: str  # of Qwen2.5-VL, 3b or 7b; or tiny, for the tests
    gpus: int = 1
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    row_tokens: int = 4096
    beta: float = 0.04

    @property
    def work(self) -> Workload:
        return WORKLOADS["tiny" if self.size == "tiny" else "image256"]


# ---- the run -------------------------------------------------------------------------------------------------------


@dataclass
class RehearsedRun(Run):
    """A run whose prompts are given and whose parts are measured."""

    given: list[Prompt] = field(default_factory=list)
    meter: Meter | None = None

    def prompts(self) -> list[Prompt]:
        return self.given

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        with super().timed(name), self.meter.part(name):
            yield


def model_config(size: str) -> PreTrainedConfig:
    """The config of Qwen2.5-VL of that size, 3b or 7b, or of the bench's small ones."""
    config = build_config("3b" if size == "7b" else size)
    if size == "7b":
        text, config.tie_word_embeddings = config.text_config, False
        text.hidden_size, text.intermediate_size, text.vocab_size = 3584, 18_944, 152_064
        text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 28, 28, 4
        config.vision_config.out_hidden_size = text.hidden_size
    return config


def load(case: Case, config: TrainConfig, world: World, *, trained: bool) -> nn.Module:
    """The policy or the reference as infra/policy.py loads it, sharded."""
    model = build_model(model_config(case.size), config, CUDA, trained=trained)
    # The model is made on the device. Module.to would swap each weight for itself, which fake tensors refuse.
    with patch.object(nn.Module, "to", lambda module, *_: module):
        return shard_model(model, world, compute_dtype=torch.bfloat16, trained=trained)


def random_model(shape: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model as model/vlm.py loads it, made on the device."""
    with device:
        model = AutoModelForImageTextToText.from_config(shape, dtype=dtype, attn_implementation="sdpa")
    use_own_layers(model)
    return model.eval()


def build_model(shape: PreTrainedConfig, config: TrainConfig, device: torch.device, *, trained: bool) -> nn.Module:
    """The policy or the reference before it is sharded."""
    model = random_model(shape, torch.bfloat16 if config.lora_rank or not trained else torch.float32, device)
    if not trained:
        return model.requires_grad_(False)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    if config.lora_rank:
        put_adapters(model, config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    return model


def build_prompt(config: PreTrainedConfig, side: int) -> Prompt:
    """A prompt of one square image of side * side tokens, and of words."""
    vision = config.vision_config
    tokens = [config.vision_start_token_id, *[config.image_token_id] * side**2, config.vision_end_token_id]
    ids = torch.tensor([[*tokens, *range(100, 100 + WORDS)]])
    patches = side * vision.spatial_merge_size
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.zeros(patches**2, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, patches, patches]]),
    }
    return Prompt(inputs, "", Sample("rehearsal", "", "", (), "", False, "rehearsal"), None, None)


def build_run(mode: FakeCuda, case: Case) -> RehearsedRun:
    """Rank 0 of a run, its optimizer warm."""
    (_, side, group_size, num_tokens), shape = case.work, model_config(case.size)
    prompt = build_prompt(shape, side)
    per_row = max(1, case.row_tokens // (prompt["input_ids"].shape[1] + group_size * num_tokens))
    config = TrainConfig(
        data="none", template="plain", dtype="bf16", beta=case.beta, lora_rank=case.lora_rank,
        gradient_checkpointing=case.gradient_checkpointing, row_tokens=case.row_tokens, group_size=group_size,
        max_completion_tokens=num_tokens, prompts_per_step=2 * per_row * case.gpus, eval_every=0,
    )  # fmt: skip
    world = World(0, case.gpus, CUDA, init_device_mesh("cuda", (case.gpus,), mesh_dim_names=("shard",)))
    policy = load(case, config, world, trained=True)
    reference = load(case, config, world, trained=False) if config.needs_reference_model else None
    optimizers = make_optimizers(policy, config)
    clip_gradients([parameter for _, parameter in trainable(policy)], 1.0)  # makes the gradients, of zero
    apply_gradients(optimizers, finite=True)  # makes the moments
    meter = Meter(mode)
    meter.memory.add([*policy.parameters(), *policy.buffers()])
    meter.memory.add([*reference.parameters(), *reference.buffers()] if reference is not None else [])
    meter.memory.add(tree_leaves([list(optimizer.state.values()) for optimizer in optimizers]))
    return RehearsedRun(
        config=config, world=world, out=Path("nowhere"), policy=policy, processor=None, reference=reference,
        optimizers=optimizers, feed=None, eval_sets={}, keeper=None, log=None, stop=None, num_steps=1, step=0,
        eos_ids=[], banned_ids=list(range(8)), blank=build_prompt(shape, 1), figures={"skipped_updates": 0.0},
        given=[prompt] * (2 * per_row), meter=meter,
    )  # fmt: skip


@contextmanager
def rehearsal(case: Case) -> Iterator[RehearsedRun]:
    """The run, for as long as the GPU is pretended."""
    logging.set_verbosity_error()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.gpus)
    try:
        with FakeCuda() as mode:
            run = build_run(mode, case)
            with run.meter.memory.resized():
                yield run
    finally:
        dist.destroy_process_group()


# ---- the step ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(run: RehearsedRun) -> Cost:
    """Reads the prompts and decodes the last token of all completions; returns the cost of that token."""
    config, forward = run.config, partial(root_forward, run.policy, next_logits)
    banned = torch.tensor(run.banned_ids, device=CUDA)

    def pick(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        ids, logprobs = pick_tokens(logits, uniform, temperature=config.temperature, banned_ids=banned)
        run.meter.mode.know(ids, 100)
        return ids, logprobs

    with drawing(run.policy, run.world):
        if tower_is_frozen(run.policy):
            run.given = [replace(prompt, inputs=see_images(run.policy, prompt)) for prompt in run.given]
            run.blank = replace(run.blank, inputs=see_images(run.policy, run.blank))  # in a real run start_run does it
        with run.timed("prefill"):
            cache, logits, positions = prefill(run.policy, run.given, config.group_size, forward)
        ends, length = torch.tensor([-1], device=CUDA), config.max_completion_tokens
        uniforms = torch.rand(length, len(logits), dtype=torch.float64, device=CUDA)
        state = Decoding(decoding_forward(run.policy), cache, positions, pick, ends, uniforms)
        state.write(logits)
        cache.reserve(ON_GPU.room(length))
        with run.timed("token"):
            decode_step(state)
    return run.meter.parts["token"]


def learn(run: RehearsedRun) -> dict[str, float]:
    """One train_step on completions that are drawn and paid already; its figures."""
    config = run.config
    number, length = len(run.given) * config.group_size, config.max_completion_tokens
    completions = [[torch.full((length,), 100).to(CUDA) for _ in range(config.group_size)] for _ in run.given]
    rollout = train.Rollout(
        prompts=run.given, completions=completions, draw_logprobs=torch.zeros(number, length, device=CUDA),
        texts=[""] * number, paid=[{"iou": 1.0}] * number, totals=torch.arange(number).float().to(CUDA),
        num_reward_errors=0,
    )  # fmt: skip
    with (
        patch.object(train, "draw", lambda run, prompts: (prompts, completions, rollout.draw_logprobs)),
        patch.object(train, "pay", lambda *drawn: rollout),
        run.timed("figures"),  # what is outside of the parts that train_step times itself
    ):
        return train.train_step(run)[1]


def repeated_flops(run: RehearsedRun) -> int:
    """Floating-point operations of the same learning by the usual way: G copies of each prompt, all logits kept."""
    size, answer = run.config.group_size, torch.full((run.config.max_completion_tokens,), 100)
    row = pack_row(run.policy, run.given[:1], [[answer]])
    inputs = {key: value.repeat(size, *[1] * (value.ndim - 1)) for key, value in row.inputs.items()}
    inputs["position_ids"] = row.inputs["position_ids"].repeat(1, size, 1)  # [3, G, P + C]
    with run.timed("repeated rows"):
        root_forward(run.policy, all_logprobs, inputs, row.predictors, row.targets).sum().backward()
    run.policy.zero_grad(set_to_none=True)
    return run.meter.parts["repeated rows"].flops * len(run.given)


def all_logprobs(model: nn.Module, inputs: dict, predictors: Tensor, targets: Tensor) -> Tensor:
    """Log-probs [G, C] of the same completion in G rows, from all its logits."""
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, predictors]
    logprobs = model.get_output_embeddings()(hidden).log_softmax(-1, dtype=torch.float32)
    return logprobs[:, torch.arange(len(targets), device=targets.device), targets]


# ---- the command ---------------------------------------------------------------------------------------------------


def row_size(run: RehearsedRun) -> RowSize:
    """What each of the two packed rows holds."""
    prompts, prompt = len(run.given) // 2, run.given[0]
    completions = run.config.group_size * run.config.max_completion_tokens
    return RowSize(
        tokens=prompts * (prompt["input_ids"].shape[1] + completions),
        prompts=prompts,
        image_tokens=prompts * int(prompt["mm_token_type_ids"].sum()),
    )


def peaks(run: RehearsedRun) -> dict[str, tuple[float, float]]:
    """(tracked, estimated) GB of the peak while drawing and while learning."""
    reference = run.reference is not None
    estimate = memory_estimate(run.policy, run.world, run.config, reference=reference, row=row_size(run))
    parts = {"drawing": ("prefill", "token"), "learning": ("learn",)}
    return {
        phase: (max(run.meter.parts[name].peak for name in names) / 1e9, sum(estimate[phase].values()))
        for phase, names in parts.items()
    }


def tables(run: RehearsedRun, token: Cost, repeated: int) -> list[str]:
    """What the rehearsal found, in Markdown."""
    parts, sequences = run.meter.parts, len(run.given) * run.config.group_size
    costs = {
        f"read {len(run.given)} prompts": parts["prefill"],
        f"draw a token of {sequences} sequences": token,
        "score under the reference": parts["score"],
        "learn": parts["learn"],
        "figures": parts["figures"],
    }
    lines = ["| part | kernels | waits | unpinned copies | TFLOP | GB moved |", "|---" * 6 + "|"]
    for name, cost in costs.items():
        waits, copies = cost.syncs.total(), cost.copies.total()
        lines.append(
            f"| {name} | {cost.kernels:,} | {waits} | {copies} | {cost.flops / 1e12:.2f} | {cost.bytes / 1e9:.2f} |"
        )
    ratio = repeated / parts["learn"].flops
    lines += ["", f"Learning the same from repeated rows takes {repeated / 1e12:.2f} TFLOP, {ratio:.2f} times as many."]
    lines += ["", "| peak memory, GB | tracked | estimated | estimated / tracked |", "|---" * 4 + "|"]
    for phase, (tracked, estimated) in peaks(run).items():
        lines.append(f"| {phase} | {tracked:.2f} | {estimated:.2f} | {estimated / tracked:.3f} |")
    for title, counter in (("waits for the GPU", "syncs"), ("copies from memory that is not pinned", "copies")):
        lines += ["", f"Where the host {title}:"]
        lines += [f"- {name}: {told(getattr(cost, counter))}" for name, cost in costs.items()]
    return lines


def told(places: Counter) -> str:
    """The places in our own code with their counts, and how many there are in transformers."""
    own = {place: count for place, count in places.most_common() if not place.startswith("transformers/")}
    parts = [f"{place} ({count})" for place, count in own.items()]
    others = places.total() - sum(own.values())
    return ", ".join([*parts, *([f"transformers ({others})"] if others else [])]) or "nowhere"


def main(argv: Sequence[str]) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m tools.rehearse", description="A step on a GPU that is not there.")
    parser.add_argument("size", choices=["3b", "7b", "tiny"], help="of Qwen2.5-VL")
    parser.add_argument("--gpus", type=int, default=1, help="ranks to pretend (default: 1)")
    parser.add_argument("--lora_rank", type=int, default=0, help="train adapters of this rank; 0 trains the weights")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--row_tokens", type=int, default=4096, help="tokens of a packed row (default: 4096)")
    parser.add_argument("--beta", type=float, default=0.04, help="weight of the KL penalty (default: 0.04)")
    case, began = Case(**vars(parser.parse_args(argv))), time.monotonic()
    torch.set_num_threads(1)  # nothing is computed
    with rehearsal(case) as run:
        repeated = repeated_flops(run)  # first, from pixels: drawing replaces them where the tower is frozen
        token = draw(run)
        learn(run)
        lines = tables(run, token, repeated)
        row = row_size(run)
    trained = f"LoRA of rank {case.lora_rank}" if case.lora_rank else "all weights"
    checkpointed = ", checkpointed" if case.gradient_checkpointing else ""
    print(f"Qwen2.5-VL {case.size}, {case.gpus} GPU(s), {trained}{checkpointed}, beta {case.beta:g}: two rows of")
    print(
        f"{row.tokens:,} tokens, {row.image_tokens:,} of them of images; {time.monotonic() - began:.0f} seconds.",
        end="\n\n",
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
