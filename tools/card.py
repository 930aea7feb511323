"""How fast a GPU draws and learns: milliseconds a token, floating-point operations a second, and where the time goes.

    python -m tools.card 3b --sequences 8 64 128 --profile

The model has Qwen2.5-VL's size and random weights, in bf16. Drawing is measured with plain calls and with CUDA graphs.
The shares compare with what this GPU reached a moment before: in a copy of 4 GB, and in a product of two matrices.
Left out: optimizer, reference and rewards; `tools.bench --rows step` has the whole step.

Shapes: B prompts, G completions of each, P prompt tokens, C tokens of a completion.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from model import graphs
from model.vlm import Prompt, checkpoint_activations
from rollout import completion_logprobs, sample_completions
from tools.costs import SEGMENTED, segment_flops
from tools.rehearse import build_prompt, model_config, random_model

GROUP, SIDE = 8, 20  # completions of a prompt; its image has SIDE * SIDE tokens, as many as one of 560 x 560 pixels
DATASHEET = 989  # TFLOP/s of an H100 or H200 in dense bf16, to which published MFU figures refer


def counted(packet: Callable) -> Callable:
    """The formula of attention in segments as FlopCounterMode takes it."""

    def count(*args: Any, out_val: Any = None, **options: Any) -> int:
        return segment_flops(packet, args)

    count._get_raw = True  # it reads the bounds, where other formulas need shapes alone
    return count


COUNTED = {packet: counted(packet) for packet in SEGMENTED}


def seconds_of(function: Callable, repeats: int = 3) -> float:
    """The median time of a call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        wait()
        begin = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def wait() -> None:
    """Waits for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ceilings(device: torch.device) -> tuple[float, float]:
    """Bytes that this GPU copies in a second, read and written, and the operations of a product in bf16."""
    source = torch.empty(2**31 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * len(source) / seconds_of(lambda: target.copy_(source), 10)
    size = 8192 if device.type == "cuda" else 256
    matrix = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    return copied, 2 * size**3 / seconds_of(lambda: matrix @ matrix, 10)


# ---- drawing -------------------------------------------------------------------------------------------------------


def draw(model: nn.Module, prompts: Sequence[Prompt], num_tokens: int) -> None:
    """Draws G completions of C tokens of each prompt; none ends earlier."""
    generator = torch.Generator(model.device).manual_seed(0)
    sample_completions(model, prompts, GROUP, max_new_tokens=num_tokens, eos_ids=[], generator=generator)


def drawing_row(model: nn.Module, prompt: Prompt, sequences: int, num_tokens: int, bandwidth: float) -> str:
    """A line of the table: a token with plain calls and as one launch, beside the time in which weights are read."""
    prompts = [prompt] * (sequences // GROUP)
    read = seconds_of(lambda: draw(model, prompts, 1))
    times = []
    for graphed in (False, True):
        graphs.GRAPHS.usable = graphed and model.device.type == "cuda"
        whole = seconds_of(lambda: draw(model, prompts, num_tokens), 1)
        times.append(f"{1e3 * (whole - read) / (num_tokens - 1):.2f}")
        if not graphs.GRAPHS.usable and graphed:  # given up, or no GPU is there
            times[-1] = "-"
    weights = sum(p.nbytes for p in model.model.language_model.parameters()) / bandwidth
    cells = (sequences, f"{1e3 * read:.2f}", *times, f"{1e3 * weights:.2f}", f"{sequences * num_tokens / whole:,.0f}")
    return f"| {' | '.join(map(str, cells))} |"


# ---- learning ------------------------------------------------------------------------------------------------------


def learn(model: nn.Module, prompts: Sequence[Prompt], num_tokens: int) -> None:
    """Log-probs of G random completions of each prompt in one row, and the gradient of their sum."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(100, 1000, (len(prompts), GROUP, num_tokens), generator=generator).to(model.device)
    logprobs = completion_logprobs(model, prompts, [list(group) for group in ids])
    sum(values.mean() for values in logprobs).backward()


def learning_row(model: nn.Module, prompts: Sequence[Prompt], num_tokens: int, product: float, name: str) -> str:
    """A line of the table: a row's forward and backward, what it computes, and its peak memory."""
    learn(model, prompts, num_tokens)  # makes the gradients
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        learn(model, prompts, num_tokens)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    flops, seconds = counter.get_total_flops(), seconds_of(lambda: learn(model, prompts, num_tokens))
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    tokens = len(prompts) * (prompts[0]["input_ids"].shape[1] + GROUP * num_tokens)
    speed = flops / seconds
    return (
        f"| {tokens:,}{name} | {seconds:.3f} | {flops / 1e12:.1f} | {speed / 1e12:.0f} | {speed / product:.0%} | "
        f"{speed / 1e12 / DATASHEET:.0%} | {tokens / seconds:,.0f} | {peak:.1f} |"
    )


# ---- where the time goes -------------------------------------------------------------------------------------------


def print_profile(title: str, function: Callable, most: int = 25) -> None:
    """Prints the kernels that took longest, and how long the GPU worked in all."""
    function()
    wait()
    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        function()
        wait()
    kernels, calls = defaultdict(float), defaultdict(int)
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] += event.device_time / 1e3
            calls[event.name] += 1
    print(
        f"\n{title}: {time.perf_counter() - begin:.3f} s under the profiler, {sum(calls.values()):,} kernels that take"
    )
    print(f"{sum(kernels.values()):.1f} ms together.\n\n| ms | calls | kernel |\n|---|---|---|")
    for name in sorted(kernels, key=kernels.get, reverse=True)[:most]:
        print(f"| {kernels[name]:.2f} | {calls[name]:,} | {name[:150].replace('|', '/')} |")


# ---- the command ---------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.card", description="How fast a GPU draws and learns.")
    parser.add_argument("size", choices=["3b", "7b", "small", "tiny"], help="of Qwen2.5-VL, or a small model")
    parser.add_argument("--sequences", type=int, nargs="+", default=[8, 64, 128], help="drawn together (8 64 128)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4], help="of a packed row (1 4)")
    parser.add_argument("--tokens", type=int, default=256, help="of a completion (256)")
    parser.add_argument("--profile", action="store_true", help="also list the kernels that take longest")
    options = parser.parse_args(argv)
    if any(number < 1 or number % GROUP for number in options.sequences):
        parser.error(f"--sequences: each must be a multiple of {GROUP}, the completions of a prompt")
    if options.tokens < 2 or min(options.prompts) < 1:
        parser.error("--tokens must be at least 2, since the first comes from reading the prompt, and --prompts 1")
    if options.profile and not torch.cuda.is_available():
        parser.error("--profile lists a GPU's kernels, and torch finds no GPU: leave it out")
    return options


def print_head(size: str, model: nn.Module, prompt: Prompt, num_tokens: int, bandwidth: float, product: float) -> None:
    """Prints what is measured, and on what."""
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else "a CPU"
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    print(f"{name}; {packages}; Qwen2.5-VL {size}, random weights in {model.dtype}.")
    print(f"It copies {bandwidth / 1e12:.2f} TB/s and multiplies at {product / 1e12:.0f} TFLOP/s.")
    print(f"Prompts of {prompt['input_ids'].shape[1]} tokens, {GROUP} completions of {num_tokens} tokens each.")


def main(argv: Sequence[str]) -> None:
    """Prints the tables."""
    options = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokens = random_model(model_config(options.size), dtype, device), options.tokens
    prompt = build_prompt(model.config, SIDE if device.type == "cuda" else 4)
    bandwidth, product = ceilings(device)
    print_head(options.size, model, prompt, tokens, bandwidth, product)
    print("\n| sequences | read prompts, ms | a token, plain, ms | a token, graph, ms | weights alone, ms | tokens/s |")
    print("|---" * 6 + "|")
    for sequences in options.sequences:
        print(drawing_row(model, prompt, sequences, tokens, bandwidth), flush=True)
    print(f"\n| tokens of a row | s | TFLOP | TFLOP/s | of the product's | MFU (of {DATASHEET}) | tokens/s | peak GB |")
    print("|---" * 8 + "|")
    for number in options.prompts:
        print(learning_row(model, [prompt] * number, tokens, product, ""), flush=True)
    many, row = [prompt] * max(1, options.sequences[-1] // GROUP), [prompt] * options.prompts[-1]
    if options.profile:
        print_profile(f"Reading {len(many)} prompts", lambda: draw(model, many, 1))
        print_profile(f"Reading them and drawing 64 tokens of {options.sequences[-1]}", lambda: draw(model, many, 64))
        print_profile(f"Learning from {len(row)} prompts", lambda: learn(model, row, tokens), 40)
    checkpoint_activations(model.train())
    print(learning_row(model, row, tokens, product, ", checkpointed"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
