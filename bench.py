"""Ours beside plain Hugging Face on the same work: time and memory of drawing, learning and the log-prob head.

`python bench.py` prints one table. Every cell runs in a fresh process, so that its peak is its own; the ways of a row
take turns, and the table shows medians with their spread, since absolute seconds on a shared machine are noise. The
model is built from a config with random weights: what is compared does not depend on what it has learned.
Left out: other trainers, real checkpoints.
"""

import json
import math
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm
from transformers import HfArgumentParser, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.hf_argparser import HfArg

from grpo import linear_logprobs
from rewards import REWARDS
from rollout import completion_logprobs, sample_completions

ROWS = {
    "draw": ("ours", "generate on repeated prompts", "generate with num_return_sequences"),
    "learn": ("ours", "repeated rows"),
    "head": ("ours", "log_softmax of all logits"),
    "rewards": ("ours",),
}
SIZES = {  # hidden, layers, heads, vocabulary, vision hidden, vision blocks
    "tiny": (64, 2, 4, 1024, 64, 2),
    "small": (256, 6, 8, 8192, 128, 4),
}
IMAGE_TOKEN, FIRST_WORD = 0, 10


@dataclass(frozen=True)
class Config:
    size: str = HfArg(default="small", help="named size of the model: tiny or small")
    side: int = HfArg(default=30, help="image tokens per side; with 24 words, 30 make a prompt of 924 tokens")
    group_size: int = HfArg(default=8, help="completions per prompt")
    completion_tokens: int = HfArg(default=64, help="tokens of each completion")
    repeats: int = HfArg(default=3, help="fresh processes per cell")
    threads: int = HfArg(default=1, help="CPU threads")
    cell: str = HfArg(default="", help="measure this 'row/way' in this process and print JSON; what the table runs")


def build_model(size: str) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with random weights."""
    hidden, layers, heads, vocabulary, vision_hidden, blocks = SIZES[size]
    head = hidden // heads
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16]}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads // 2, "rope_parameters": rope,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 1,
        },
        vision_config={
            "depth": blocks, "hidden_size": vision_hidden, "num_heads": 4, "intermediate_size": 4 * vision_hidden,
            "out_hidden_size": hidden, "fullatt_block_indexes": [blocks - 1],
        },
        image_token_id=IMAGE_TOKEN, video_token_id=1, vision_start_token_id=2, vision_end_token_id=3,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def build_prompt(side: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """What a processor returns for one image of side x side tokens and 24 words."""
    words = torch.randint(FIRST_WORD, vocabulary, (24,))
    ids = torch.cat([words[:4], torch.full((side * side,), IMAGE_TOKEN), words[4:]])[None]
    patches = torch.randn(4 * side * side, 3 * 2 * 14 * 14)
    return {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE_TOKEN).long(), "attention_mask": torch.ones_like(ids),
            "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]])}  # fmt: skip


def repeated(prompt: dict[str, torch.Tensor], times: int) -> dict[str, torch.Tensor]:
    """The prompt as a batch of so many copies, image included."""
    return {key: value.repeat(times, *[1] * (value.ndim - 1)) for key, value in prompt.items()}


def draw(way: str, model: torch.nn.Module, prompt: dict, config: Config) -> None:
    """A group of completions of exactly completion_tokens each."""
    count, length = config.group_size, config.completion_tokens
    options = {"max_new_tokens": length, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if way == "ours":
        sample_completions(model, [prompt], count, max_new_tokens=length, eos_ids=[-1], banned_ids=[IMAGE_TOKEN])
    elif way == "generate on repeated prompts":
        model.generate(**repeated(prompt, count), suppress_tokens=[IMAGE_TOKEN], **options)
    else:
        model.generate(**prompt, num_return_sequences=count, suppress_tokens=[IMAGE_TOKEN], **options)


def learn(way: str, model: torch.nn.Module, prompt: dict, config: Config) -> None:
    """Log-probs of a group and their gradient in every parameter."""
    vocabulary = model.config.text_config.vocab_size
    answers = torch.randint(FIRST_WORD, vocabulary, (config.group_size, config.completion_tokens))
    if way == "ours":
        [logprobs] = completion_logprobs(model, [prompt], [list(answers)])
    else:
        batch = repeated(prompt, config.group_size)
        ids = torch.cat([batch.pop("input_ids"), answers], 1)
        types = torch.cat([batch.pop("mm_token_type_ids"), torch.zeros_like(answers)], 1)
        batch["attention_mask"] = torch.ones_like(ids)
        logits = model(input_ids=ids, mm_token_type_ids=types, logits_to_keep=answers.shape[1] + 1, **batch).logits
        logprobs = logits[:, :-1].log_softmax(-1).gather(2, answers[..., None])[..., 0]
    (logprobs * torch.randn(config.group_size, 1)).sum().backward()


def head(way: str, model: torch.nn.Module, prompt: dict, config: Config) -> None:
    """Log-probs of 2,000 tokens from hidden states of 1,024, at Qwen's vocabulary of 151,936, and their gradients."""
    hidden, weight = torch.randn(2000, 1024, requires_grad=True), torch.randn(151_936, 1024, requires_grad=True)
    ids = torch.randint(151_936, (2000,))
    if way == "ours":
        logprobs, _ = linear_logprobs(hidden, weight, ids)
    else:
        logprobs = (hidden @ weight.t()).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    logprobs.sum().backward()


def rewards(way: str, model: torch.nn.Module, prompt: dict, config: Config) -> None:
    """A step of 128 completions with 20 boxes of 4 classes each, scored by od_length."""
    boxes = [[10 * n, 5 * n, 10 * n + 40, 5 * n + 30] for n in range(20)]
    true = [{"bbox_2d": box, "label": f"class {n % 4}"} for n, box in enumerate(boxes)]
    said = [
        {"bbox_2d": [x1 + n % 7, y1, x2, y2 - n % 5], "label": f"class {n % 4}"}
        for n, (x1, y1, x2, y2) in enumerate(boxes)
    ]
    completion, answer = (f"<answer>```json\n{json.dumps(items)}\n```</answer>" for items in (said, true))
    for _ in range(128):
        REWARDS["od_length"](completion, answer)


def measure(config: Config) -> dict[str, float]:
    """Seconds of one run after a warm-up, and the growth of this process's peak over both, in MB."""
    torch.set_num_threads(config.threads)
    row, way = config.cell.split("/")
    model = build_model(config.size)
    prompt = build_prompt(config.side, model.config.text_config.vocab_size)
    function = {"draw": draw, "learn": learn, "head": head, "rewards": rewards}[row]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if row != "head":  # its 300 GFLOP need no warm-up
        function(way, model, prompt, config)
        model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    function(way, model, prompt, config)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3}


def run_cell(config: Config, cell: str) -> dict[str, float]:
    """The same in a fresh process."""
    options = [f"--{name}={value}" for name, value in {**asdict(config), "cell": cell}.items()]
    done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True)
    if done.returncode and cell.endswith("/ours"):
        raise SystemExit(f"{cell} failed:\n{done.stderr[-2000:]}")
    if done.returncode:  # transformers 5.17 cannot expand the images of num_return_sequences
        tqdm.write(f"{cell} failed in transformers: {done.stderr.strip().splitlines()[-1]}")
        return {"seconds": math.nan, "megabytes": math.nan}
    return json.loads(done.stdout.splitlines()[-1])


def main(config: Config) -> None:
    if config.cell:
        print(json.dumps(measure(config)))
        return
    cells = [f"{row}/{way}" for row, ways in ROWS.items() for way in ways]
    results = {cell: [] for cell in cells}
    for cell in tqdm(cells * config.repeats):
        results[cell].append(run_cell(config, cell))
    work = f"{config.size}, prompt {config.side**2 + 24}, G {config.group_size}, C {config.completion_tokens}"
    print(f"{work}; torch {torch.__version__}, {config.threads} CPU thread(s), {config.repeats} processes a cell\n")
    print("| row | way | seconds (spread) | times ours | peak growth MB | times ours |\n|---|---|---|---|---|---|")
    for row, ways in ROWS.items():
        medians = {}
        for way in ways:
            seconds, peaks = ([run[key] for run in results[f"{row}/{way}"]] for key in ("seconds", "megabytes"))
            medians[way] = statistics.median(seconds), statistics.median(peaks)
            time_ratio, peak_ratio = (a / b for a, b in zip(medians[way], medians["ours"], strict=True))
            spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
            print(f"| {row} | {way} | {medians[way][0]:.3f} ({spread}) | {time_ratio:.1f} ", end="")
            print(f"| {medians[way][1]:,.0f} | {peak_ratio:.1f} |")


if __name__ == "__main__":
    main(HfArgumentParser(Config, allow_abbrev=False).parse_args_into_dataclasses(look_for_args_file=False)[0])
