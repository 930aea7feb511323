"""Ours beside plain Hugging Face and TRL on the same work: one table of time and memory.

    python -m tools.bench --rows draw learn --workloads image long

`draw` draws completions, `learn` computes their log-probs and gradients, `step` is a whole training step, `head` goes
from hidden states to gradients over Qwen's vocabulary, `rewards` scores 128 detection answers. Each cell runs in fresh
processes, so its peak memory is its own, and the ways of a row take turns. Seconds are CPU seconds of one thread, which
other programs disturb least, or wall time on a GPU. No way draws an end token, so all draw the same number of tokens.
On a GPU `draw` and `learn` use a plain bf16 model; `step` has fp32 masters.
Left out: several processes, other trainers, the KL penalty.

Shapes: B prompts, G completions of each, N = B * G, P prompt tokens, C tokens of a completion.
"""

import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from data import read_samples
from infra.config import TrainConfig
from infra.modelcheck import check_model
from infra.options import check_bounds, config_from_command_line, option
from infra.run import start_run
from model import vlm
from model.logprobs import linear_logprobs
from rewards import REWARDS
from rollout import completion_logprobs, sample_completions, takes_image_features
from tools.bench_inputs import MODELS, WORKLOADS, Workload, write_data, write_model
from train import train_step


class Job(NamedTuple):
    """A cell of the table, and what its processes need."""

    row: str
    workload: str  # "-" in a row that has none
    way: str
    model: str  # directory or hub name
    data: Path  # JSONL file of the workload's samples
    device: str


# ---- draw and learn ------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What the ways of `draw` and `learn` work on."""

    model: nn.Module
    processor: transformers.ProcessorMixin
    prompts: list[vlm.Prompt]  # B
    workload: Workload
    never: list[int]  # ids that are never drawn: what training bans, and the end tokens


def load_work(job: Job, dtype: torch.dtype) -> Work:
    """The model on its device, as we load it or as transformers does, and the prompts of the workload."""
    if WAYS[job.row][job.way].plain:
        options = {"dtype": dtype, "attn_implementation": "sdpa"}
        model = transformers.AutoModelForImageTextToText.from_pretrained(job.model, **options).eval()
    else:
        model, _ = vlm.load_model(job.model, dtype=dtype)
    processor = vlm.load_processor(job.model)
    samples = read_samples(job.data, job.data.parent)
    prompts = [vlm.build_prompt(processor, sample, template="plain") for sample in samples]
    never = sorted({*vlm.banned_token_ids(model, processor), *vlm.eos_token_ids(model, processor)})
    return Work(read_weights(model.to(job.device)), processor, prompts, WORKLOADS[job.workload], never)


def read_weights(model: nn.Module) -> nn.Module:
    """The model, its weights in memory: a loader only maps their file, and a first use would count as growth."""
    for parameter in model.parameters():
        parameter.detach().sum()
    return model


def repeated(prompt: vlm.Prompt, times: int, device: torch.device) -> dict[str, Tensor]:
    """That many copies of a prompt as a batch, images included."""
    return {key: value.to(device).repeat(times, *[1] * (value.ndim - 1)) for key, value in prompt.items()}


def draw_ours(work: Work) -> list[Tensor]:
    """N completions [C], each prompt read once."""
    options = {"max_new_tokens": work.workload.num_tokens, "eos_ids": [], "banned_ids": work.never}
    return sum(sample_completions(work.model, work.prompts, work.workload.group_size, **options), [])


def draw_by_generate(work: Work, *, repeat: bool) -> Tensor:
    """Completions [N, C] by Hugging Face's generate, from G copies of each prompt or by num_return_sequences."""
    copies = work.workload.group_size if repeat else 1
    rows = [repeated(prompt, copies, work.model.device) for prompt in work.prompts]
    batch = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}  # all of one length, so without padding
    drawn = work.model.generate(
        **batch, num_return_sequences=work.workload.group_size // copies, max_new_tokens=work.workload.num_tokens,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, suppress_tokens=work.never,
    )  # fmt: skip
    return drawn[:, batch["input_ids"].shape[1] :]


def learn(logprobs_of: Callable, work: Work) -> Tensor:
    """Log-probs [B, G, C] of random completions, after the backward of their weighted sum, a group at a time."""
    num_prompts, _, group_size, num_tokens = work.workload
    highest, generator = min(50_000, work.model.config.get_text_config().vocab_size), torch.Generator().manual_seed(1)
    completions = torch.randint(100, highest, (num_prompts, group_size, num_tokens), generator=generator)
    weights = torch.randn(num_prompts, group_size, 1, generator=generator).to(work.model.device)
    all_logprobs = []
    for prompt, group, weight in zip(work.prompts, completions.to(work.model.device), weights, strict=True):
        logprobs = logprobs_of(work.model, prompt, group)
        (logprobs * weight).sum().backward()
        all_logprobs.append(logprobs.detach())
    return torch.stack(all_logprobs)


def packed_logprobs(model: nn.Module, prompt: vlm.Prompt, group: Tensor) -> Tensor:
    """Log-probs [G, C] of a group [G, C] as train.py computes them: one packed row."""
    return completion_logprobs(model, [prompt], [list(group)])[0]


def repeated_logprobs(model: nn.Module, prompt: vlm.Prompt, group: Tensor, *, vision_once: bool = False) -> Tensor:
    """Log-probs [G, C] of a group [G, C] as most trainers compute them: G copies of the prompt, all logits kept."""
    batch = repeated(prompt, len(group), model.device)
    batch["input_ids"] = torch.cat([batch["input_ids"], group], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(group)], 1)
    if vision_once:
        if not takes_image_features(model):  # it would ignore them without a word
            raise ValueError(f"transformers {transformers.__version__} takes no image features; 5.23 does")
        pixels = batch.pop("pixel_values")[: len(prompt["pixel_values"])]
        features = model.model.get_image_features(pixels, prompt["image_grid_thw"].to(model.device))
        features.pooler_output = tuple(features.pooler_output) * len(group)
        batch["mm_encoder_outputs"] = {"image": features}
    logits = model(**batch, logits_to_keep=group.shape[1] + 1).logits[:, :-1]
    return logits.log_softmax(-1, dtype=torch.float32).gather(2, group[..., None])[..., 0]


# ---- a whole step, the head, rewards -------------------------------------------------------------------------------


class Meter(transformers.TrainerCallback):
    """Measures seconds and the growth of the peak memory in MB; as a callback, those of a trainer's last step."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def ready(self) -> None:
        """Counts the growth of the memory from here, where everything is loaded."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        _, self.base = self._read()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin, _ = self._read()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        end, peak = self._read()
        self.result = end - self.begin, peak - self.base

    def _read(self) -> tuple[float, float]:
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter(), torch.cuda.max_memory_allocated() / 1e6
        return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def step_ours(job: Job, meter: Meter, *, checkpointed: bool = False) -> None:
    """The second step of train.py, in which a thread also prepares the prompts of the third."""
    num_prompts, _, group_size, num_tokens = WORKLOADS[job.workload]
    config = TrainConfig(
        model=job.model, data=str(job.data), template="plain", rewards=[f"{__file__}:any_reward"], beta=0.0,
        prompts_per_step=num_prompts, group_size=group_size, max_completion_tokens=num_tokens,
        gradient_checkpointing=checkpointed, steps=3, held_out=0, eval_every=0, save_every=0,
        output_dir=tempfile.mkdtemp(dir=job.data.parent),
    )  # fmt: skip
    with start_run(config) as run:
        run.banned_ids = sorted({*run.banned_ids, *run.eos_ids})
        read_weights(run.policy)
        meter.ready()
        for step in run.steps():
            meter.on_step_begin()
            rollout, figures = train_step(run)
            meter.on_step_end()
            if step == 1:
                break
            run.end_step(figures, rollout.prompts)
    assert figures["completion_tokens"] == num_tokens and figures["groups_equal"] == 0  # an equal group learns nothing


def any_reward(completion: str, answer: str) -> float:
    """A number that differs between the completions of a group."""
    return zlib.crc32(completion.encode()) / 2**32


def step_trl(job: Job, meter: Meter, *, checkpointed: bool = False) -> None:
    """The second step of TRL's trainer, with a group in each micro-batch."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    work = load_work(job, torch.float32)
    num_prompts, _, group_size, num_tokens = work.workload
    samples = [prompt.sample for prompt in work.prompts]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(dir=job.data.parent), use_cpu=job.device == "cpu", bf16=job.device == "cuda",
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, max_steps=2,
        learning_rate=1e-6, lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0, beta=0.0,
        loss_type="grpo", temperature=1.0, top_k=0, per_device_train_batch_size=group_size,
        gradient_accumulation_steps=num_prompts, num_generations=group_size, max_completion_length=num_tokens,
        gradient_checkpointing=checkpointed, generation_kwargs={"suppress_tokens": work.never},
    )  # fmt: skip
    questions = [[{"role": "user", "content": sample.question}] for sample in samples]
    rows = {"prompt": questions, "images": [[Image.open(sample.images[0])] for sample in samples]}
    trainer = GRPOTrainer(
        model=work.model, processing_class=work.processor, args=config, train_dataset=Dataset.from_dict(rows),
        reward_funcs=lambda completions, **_: [float(number) for number in range(len(completions))],
        callbacks=[meter],
    )  # fmt: skip
    meter.ready()
    trainer.train()


def head(states: Tensor, weight: Tensor, ids: Tensor, *, plain: bool = False) -> tuple[Tensor, ...]:
    """Gradients of the summed log-probs of ids [T], by blocks of the vocabulary or with all logits kept."""
    if plain:
        logprobs = (states @ weight.t()).log_softmax(-1, dtype=torch.float32).gather(1, ids[:, None])
    else:
        logprobs, _ = linear_logprobs(states, weight, ids)
    return torch.autograd.grad(logprobs.sum(), (states, weight))


def score_boxes() -> None:
    """Scores 128 completions of 20 boxes of 4 classes with od_length."""
    corners = [(10 * number, 5 * number, 10 * number + 40, 5 * number + 30) for number in range(20)]
    true = [{"bbox_2d": box, "label": f"class {number % 4}"} for number, box in enumerate(corners)]
    said = [item | {"bbox_2d": [side + side % 7 for side in item["bbox_2d"]]} for item in true]
    completion, answer = (f"<answer>```json\n{json.dumps(items)}\n```</answer>" for items in (said, true))
    for _ in range(128):
        REWARDS["od_length"](completion, answer)


# ---- cells ---------------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """One way to do the work of a row."""

    run: Callable
    plain: bool = False  # the model as transformers loads it, under sdpa; packed rows then take the dense mask
    checkpointed: bool = False


PACKED, REPEATED = partial(learn, packed_logprobs), partial(learn, repeated_logprobs)
WAYS = {
    "draw": {
        "ours": Way(draw_ours),
        "generate on repeated prompts": Way(partial(draw_by_generate, repeat=True), plain=True),
        "generate with num_return_sequences": Way(partial(draw_by_generate, repeat=False), plain=True),
    },
    "learn": {
        "ours": Way(PACKED),
        "ours, dense mask": Way(PACKED, plain=True),
        "ours, checkpointed": Way(PACKED, checkpointed=True),
        "repeated rows": Way(REPEATED, plain=True),
        "repeated rows, vision once": Way(partial(learn, partial(repeated_logprobs, vision_once=True)), plain=True),
        "repeated rows, checkpointed": Way(REPEATED, plain=True, checkpointed=True),
    },
    "step": {
        "ours": Way(step_ours),
        "ours, checkpointed": Way(partial(step_ours, checkpointed=True)),
        "TRL": Way(step_trl, plain=True),
        "TRL, checkpointed": Way(partial(step_trl, checkpointed=True), plain=True),
    },
    "head": {"ours": Way(head), "log_softmax of all logits": Way(partial(head, plain=True))},
    "rewards": {"ours": Way(score_boxes)},
}


def measure(job: Job) -> tuple[float, float]:
    """Seconds and growth in MB of a cell, measured in this process."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    way, meter = WAYS[job.row][job.way], Meter(job.device)
    if job.row == "step":
        way.run(job, meter)
        return meter.result
    inputs, few = inputs_of(job, way)
    meter.ready()
    way.run(*(inputs if meter.cuda else few))  # warms up; a GPU's allocator has to find memory of each size first
    if job.row == "learn":
        inputs[0].model.zero_grad()
    meter.on_step_begin()
    way.run(*inputs)
    meter.on_step_end()
    return meter.result


def inputs_of(job: Job, way: Way) -> tuple[tuple, tuple]:
    """The arguments of the ways of a row, and smaller ones of the same kind."""
    dtype = torch.bfloat16 if job.device == "cuda" else torch.float32
    if job.row == "rewards":
        return (), ()
    if job.row == "head":  # 2,000 tokens at the size of Qwen's vocabulary
        options = {"device": job.device, "dtype": dtype, "requires_grad": True}
        states, weight = (torch.randn(size, 1024, **options) for size in (2000, 151_936))
        ids = torch.randint(len(weight), (len(states),), device=job.device)
        return (states, weight, ids), (states[:8], weight, ids[:8])
    work = load_work(job, dtype)
    if way.checkpointed:
        vlm.checkpoint_activations(work.model.train())
    return (work,), (work._replace(workload=work.workload._replace(num_tokens=2)),)


def in_fresh_process(function: Callable, *arguments: Any, device: str) -> Any:
    """function(*arguments), in a process of its own."""
    # A server that has imported torch forks the processes. CUDA cannot be forked: there each one starts anew.
    context = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
    context.set_forkserver_preload(["train"])
    with ProcessPoolExecutor(1, mp_context=context, initializer=hush) as pool:
        return pool.submit(function, *arguments).result()


def hush() -> None:
    """Drops everything that this process prints."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


# ---- the command ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchOptions:
    """Options."""

    rows: list[str] = option(list(WAYS), "rows to measure")
    ways: list[str] = option([], "only these ways of the rows, as ours TRL")
    workloads: list[str] = option(["image"], f"workloads of draw, learn and step, of {', '.join(WORKLOADS)}")
    repeats: int = option(3, "processes per cell", above=0)
    model: str = option("", "tiny, small, 3b, qwen3_5, a directory or a hub name; by default 3b on a GPU, else small")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto is a GPU if there is one")


@dataclass(frozen=True)
class BenchConfig(BenchOptions):
    """Time and memory of ours, plain Hugging Face and TRL (if it is installed) on the same work."""

    GROUPS: ClassVar[tuple[type, ...]] = (BenchOptions,)
    PROGRAM: ClassVar[str] = "-m tools.bench"

    def __post_init__(self) -> None:
        check_bounds(self)
        ways = dict.fromkeys(way for row in self.rows for way in WAYS.get(row, ()))  # in the order of the rows
        for option_name, known in (("rows", WAYS), ("ways", ways), ("workloads", WORKLOADS)):
            for name in getattr(self, option_name):
                if name not in known:
                    raise ValueError(f"{option_name}: {name!r} is unknown: choose among {', '.join(known)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no GPU: leave --device out")
        if self.model and self.model not in MODELS:
            check_model(self.model)


def main(config: BenchConfig) -> int:
    """Prints the table; returns 1 if a way of ours could not be measured."""
    os.environ["OMP_NUM_THREADS"] = "1"
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    model = config.model or {"cuda": "3b", "cpu": "small"}[device]
    results, failures = defaultdict(list), {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = plan(config, model, Path(folder), device)
        bar = tqdm(jobs * config.repeats, unit="cell")  # in this order the ways of a row take turns
        for job in bar:
            bar.set_description(f"{job.row} {job.workload} {job.way}")
            if job in failures:
                continue
            try:
                results[job].append(in_fresh_process(measure, job, device=device))
            except Exception as error:  # the table says what kept a way from running
                reason = (str(error).strip() or "no message").splitlines()[0].replace("|", "/")
                failures[job] = f"not measured ({type(error).__name__}: {reason[:200]})"
    packages = [f"{package} {version(package)}" for package in ("torch", "transformers", "trl") if find_spec(package)]
    clock = f"{torch.cuda.get_device_name()}, wall" if device == "cuda" else "one CPU thread, CPU"
    print(f"{time.strftime('%B %Y')}; {', '.join(packages)}; model {model}; {clock} seconds,")
    print(f"medians (smallest to largest) of {config.repeats} processes. Growth is that of the peak memory.\n")
    print("\n".join([*(f"- `{name}`: {WORKLOADS[name]}" for name in config.workloads), ""]))
    print("\n".join(table(jobs, results, failures)))
    return int(any(job.way.startswith("ours") for job in failures))


def plan(config: BenchConfig, model: str, folder: Path, device: str) -> list[Job]:
    """The cells of the table, in its order, after the model and the data are written."""
    if model in MODELS:
        in_fresh_process(write_model, model, folder / "model", device, device=device)
        model = str(folder / "model")
    for name in config.workloads:
        write_data(WORKLOADS[name], folder / f"{name}.jsonl")
    jobs = []
    for row in config.rows:
        for name in ["-"] if row in ("head", "rewards") else config.workloads:
            ways = [way for way in WAYS[row] if way in (config.ways or WAYS[row])]
            jobs += [Job(row, name, way, model, folder / f"{name}.jsonl", device) for way in ways]
    return jobs


def table(jobs: list[Job], results: dict[Job, list], failures: dict[Job, str]) -> list[str]:
    """A Markdown table with a line for each cell."""
    medians = {
        job: [statistics.median(column) for column in zip(*results[job], strict=True)]
        for job in jobs
        if job not in failures
    }
    lines = ["| row | workload | way | seconds | times ours | growth, MB | times ours |", "|---" * 7 + "|"]
    for job in jobs:
        cells = [failures.get(job, ""), "", "", ""]
        if job in medians:
            seconds, growth = medians[job]
            cells[0] = f"{seconds:.3f} ({min(results[job])[0]:.3f} to {max(results[job])[0]:.3f})"
            cells[2] = f"{growth:,.0f}"
            ours = medians.get(job._replace(way="ours"), [0.0, 0.0])
            cells[1], cells[3] = (f"{x / base:.1f}" if base else "" for x, base in zip(medians[job], ours, strict=True))
        lines.append(f"| {' | '.join((job.row, job.workload, job.way, *cells))} |")
    return lines


if __name__ == "__main__":
    sys.exit(main(config_from_command_line(BenchConfig, sys.argv[1:], {})))
