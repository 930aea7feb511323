"""What train.py and sft.py share: the options they both have, optimizer and schedule, the samples of a step, the log.

Nothing here knows rewards or losses. Options are dataclass fields: the command line, `--help`, config.json and the
code all have the same names, and what no code reads does not exist.
"""

import json
import math
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import HfArgumentParser, ProcessorMixin
from transformers.hf_argparser import HfArg

import toy
from data import BadSample, Sample, check_samples, read_samples, step_indices, template_text
from grpo import CHUNK_LOGITS
from parallel import World, all_gather, all_sum, load_training_state, save_checkpoint, shard_model
from vlm import MAX_PIXELS, Prompt, build_prompt, load_model, trainable

MAX_BAD_SHARE = 0.01  # of the samples used; more than that is a broken data set, not a broken file
# Options that another value than the saved one may be given for when a run is resumed; the others make it another run.
FREE_ON_RESUME = frozenset({"resume", "output_dir", "steps", "row_tokens", "eval_every", "eval_batch_size", "save_every",
                            "keep_checkpoints", "log_completions_every", "tensorboard", "wandb", "dry_run",
                            "gradient_checkpointing"})  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    model: str = HfArg(
        default=str(toy.MODEL), help="hub name or directory; without it the toy is trained, under its preset"
    )
    data: list[str] = HfArg(default_factory=list, help="training files in VLM-R1's JSONL format")
    image_root: list[str] = HfArg(default_factory=list, help="image directory of each data file, or one for all; the file's own by default")
    template: str = HfArg(default="rec", help="prompt template: a name of data.TEMPLATES or a text with {question}")
    max_pixels: int = HfArg(default=MAX_PIXELS, help="pixels of an image at most; a larger one is shrunk")
    min_pixels: int = HfArg(default=3136, help="pixels of an image at least; a smaller one is enlarged")
    freeze_vision: bool = HfArg(default=False, help="leave the vision tower as it is")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, a third more time")
    dtype: Literal["auto", "bf16", "fp32"] = HfArg(
        default="auto", help="compute in; auto is bf16 on a GPU. Masters are fp32"
    )
    shard_within_node: bool = HfArg(default=False, help="several nodes: shard within each, replicate across (HSDP)")
    prompts_per_step: int = HfArg(default=16, help="prompts per optimizer step, over all GPUs")
    row_tokens: int = HfArg(default=8192, help="tokens of a packed row, the micro-batch: the knob for memory")
    steps: int = HfArg(default=0, help="steps to train; 0 for --epochs")
    epochs: float = HfArg(default=1.0, help="passes over the data, where --steps is 0")
    optimizer: Literal["adamw", "muon"] = HfArg(
        default="adamw", help="muon: on the matrices, AdamW at a tenth on the rest"
    )
    learning_rate: float = HfArg(default=1e-6, help="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = HfArg(
        default="constant", help="after the warm-up: stay, or fall to 0"
    )
    warmup_steps: int = HfArg(default=0, help="steps over which the learning rate rises from 0")
    weight_decay: float = HfArg(default=0.0, help="decoupled weight decay")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are scaled down to this norm")
    max_completion_tokens: int = HfArg(default=2048, help="tokens of a completion at most, in drawing and evaluation")
    eval_data: list[str] = HfArg(
        default_factory=list, help="evaluation files; the first decides which checkpoint is best"
    )
    eval_image_root: list[str] = HfArg(
        default_factory=list, help="image directory of each evaluation file, or one for all"
    )
    held_out: int = HfArg(
        default=200, help="without eval_data: samples kept from training, at most a twentieth of them"
    )
    eval_every: int = HfArg(default=100, help="steps between evaluations; one comes before the first step; 0 for none")
    eval_batch_size: int = HfArg(default=32, help="answers decoded together per process")
    save_every: int = HfArg(default=100, help="steps between checkpoints; the last step is saved always")
    keep_checkpoints: int = HfArg(default=2, help="newest checkpoints kept, besides the best")
    seed: int = HfArg(default=0, help="of the data order and of what is drawn")
    output_dir: str = HfArg(default="", help="where the run is written; runs/DATE-TIME by default")
    resume: str = HfArg(default="", help="output directory of a run to go on with, under the options saved there")
    tensorboard: bool = HfArg(default=False, help="write the metrics for tensorboard too")
    wandb: bool = HfArg(default=False, help="send the metrics to wandb too")
    dry_run: bool = HfArg(default=False, help="print what a run would do and need, and stop")

    def __post_init__(self) -> None:
        """Refuses what is contradictory, before anything is loaded."""
        if not self.data:
            raise ValueError(f"data is empty: with --model {self.model} name at least one file, --data F.jsonl")
        for data, roots in (("data", "image_root"), ("eval_data", "eval_image_root")):
            files, given = len(getattr(self, data)), len(getattr(self, roots))
            if given not in (0, 1, files):
                raise ValueError(f"{given} {roots} for {files} files in {data}: give one for all, one for each, or none")
        for name in ("prompts_per_step", "row_tokens", "max_completion_tokens", "eval_batch_size", "save_every",
                     "keep_checkpoints", "learning_rate", "max_grad_norm", "min_pixels"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("steps", "warmup_steps", "weight_decay", "held_out", "eval_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.steps == 0 and self.epochs <= 0:
            raise ValueError(f"steps is 0 and epochs {self.epochs}: one of them must say how long to train")
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"max_pixels {self.max_pixels} is below min_pixels {self.min_pixels}")
        if self.steps and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leaves nothing of {self.steps} steps")
        template_text(self.template)


def parse_options(config_class: type, argv: Sequence[str], preset: dict):
    """The options of an entry point from the command line; unknown ones are an error.

    Without --model the preset of the toy stands in for the defaults; with --resume the run's saved options do.
    """
    parser = HfArgumentParser(config_class, allow_abbrev=False)
    given = _given_options(config_class, argv)
    if given.get("resume"):
        saved = _saved_options(Path(given["resume"]), config_class)
        for name, value in given.items():
            if name not in FREE_ON_RESUME and value != saved[name]:
                raise ValueError(f"{name} was {saved[name]!r} in the run resumed and is {value!r} now: leave it out, or "
                                 "start a new run")  # fmt: skip
        parser.set_defaults(**saved)
    elif "model" not in given:
        toy.write_data()
        parser.set_defaults(**preset)
    return parser.parse_args_into_dataclasses(args=list(argv), look_for_args_file=False)[0]


def _given_options(config_class: type, argv: Sequence[str]) -> dict:
    """The options that the command line names, parsed."""
    parser, absent = HfArgumentParser(config_class, allow_abbrev=False), object()
    parser.set_defaults(**{field.name: absent for field in fields(config_class)})
    return {name: value for name, value in vars(parser.parse_known_args(list(argv))[0]).items() if value is not absent}


def _saved_options(run: Path, config_class: type) -> dict:
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --resume takes the output directory of a run")
    saved = json.loads(path.read_text())["options"]
    names = {field.name for field in fields(config_class)}
    if names != set(saved):
        raise ValueError(
            f"{path}: written by another version or entry point; the options differ: {sorted(names ^ set(saved))}"
        )
    return {**saved, "resume": str(run), "output_dir": str(run)}


def compute_dtype(name: str) -> torch.dtype:
    """bf16 or fp32 for "auto", "bf16" or "fp32"."""
    bf16 = torch.cuda.is_available() if name == "auto" else name == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


def open_run(config: RunConfig, world: World) -> Path:
    """The output directory, made and with config.json in it; refuses one that holds another run."""
    name = config.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(all_gather([name], world)[0])  # the clocks of the ranks may differ
    if not config.resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} holds a run: give another --output_dir, or --resume {out} to go on with it")
    if world.first:
        out.mkdir(parents=True, exist_ok=True)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        (out / "config.json").write_text(json.dumps({"options": asdict(config), "versions": versions}, indent=1))
    return out


def load_policy(config: RunConfig, world: World) -> tuple[nn.Module, ProcessorMixin]:
    """The model to train, sharded, with fp32 masters, and its processor."""
    if config.prompts_per_step < world.size:
        raise ValueError(
            f"prompts_per_step {config.prompts_per_step} is below the {world.size} processes: each needs a prompt"
        )
    model, processor = load_model(
        config.model, max_pixels=config.max_pixels, min_pixels=config.min_pixels, freeze_vision=config.freeze_vision,
        gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    return shard_model(model, world, compute_dtype=compute_dtype(config.dtype)), processor


def load_reference(config: RunConfig, world: World) -> nn.Module:
    """The frozen model that the KL penalty measures from: the one training started with, sharded, in the compute dtype."""
    dtype = compute_dtype(config.dtype)
    model, _ = load_model(config.model, dtype=dtype)
    return shard_model(model.requires_grad_(False), world, compute_dtype=dtype, trained=False)


# ---- optimizer -----------------------------------------------------------------------------------------------------


def make_optimizers(model: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """AdamW over all trained parameters; or Muon over the matrices and AdamW, at a tenth of its rate, over the rest."""
    head = model.get_output_embeddings().weight
    embeddings = model.get_input_embeddings().weight
    parameters = [parameter for _, parameter in trainable(model)]
    adamw = {"weight_decay": config.weight_decay, "fused": parameters[0].is_cuda}
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, lr=config.learning_rate, **adamw)]
    matrices = [p for p in parameters if p.ndim == 2 and p is not head and p is not embeddings]
    taken = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay),
        torch.optim.AdamW(rest, lr=config.learning_rate / 10, **adamw),
    ]


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: str) -> float:
    """What the peak learning rate is multiplied by in a step counted from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> float:
    """Scales every group's rate from the one it was made with; returns the first group's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return optimizers[0].param_groups[0]["lr"]


# ---- samples -------------------------------------------------------------------------------------------------------


def load_samples(files: Sequence[str], roots: Sequence[str], *, has_boxes: bool, progress: bool) -> list[list[Sample]]:
    """The checked samples of each file."""
    sets = [
        read_samples(path, roots[number % len(roots)] if roots else Path(path).parent, has_boxes=has_boxes)
        for number, path in enumerate(files)
    ]
    check_samples([sample for samples in sets for sample in samples], progress=progress)
    return sets


def split_held_out(samples: list[Sample], held_out: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(for training, held out): a seeded draw of at most a twentieth; the same on every rank and on resume."""
    count = min(held_out, len(samples) // 20)
    chosen = set(random.Random(seed).sample(range(len(samples)), count))
    return [s for i, s in enumerate(samples) if i not in chosen], [s for i, s in enumerate(samples) if i in chosen]


class PromptFeed:
    """The prompts of each step, this rank's share; samples that turn out broken are set aside, named and replaced."""

    def __init__(
        self, samples: Sequence[Sample], processor: ProcessorMixin, config: RunConfig, family: str, world: World
    ):
        self.samples, self.processor, self.config, self.family, self.world = samples, processor, config, family, world
        self.broken: dict[int, str] = {}  # sample -> reason
        self.used = 0

    def figures(self) -> dict[str, float]:
        """How many samples were set aside on all ranks so far."""
        return all_sum({"bad_samples": float(len(self.broken))}, self.world)

    def take(self, step: int) -> list[Prompt]:
        """The prompts of a step, every world.size-th from this rank on."""
        indices = step_indices(len(self.samples), self.config.prompts_per_step, step, self.config.seed)
        return [self._build(index) for index in indices[self.world.rank :: self.world.size]]

    def _build(self, index: int) -> Prompt:
        """The prompt of that sample, or of the next one that is not broken."""
        while True:
            self.used += 1
            if index not in self.broken:
                try:
                    return build_prompt(
                        self.processor, self.samples[index], family=self.family, template=self.config.template
                    )
                except BadSample as error:
                    self._set_aside(index, error)
            index = (index + 1) % len(self.samples)

    def _set_aside(self, index: int, error: BadSample) -> None:
        self.broken[index] = str(error)
        sample = self.samples[index]
        tqdm.write(f"warning: {sample.source} is set aside: {error}")
        if len(self.broken) > max(2, MAX_BAD_SHARE * self.used):
            raise ValueError(f"{len(self.broken)} of {self.used} samples used are broken, more than {MAX_BAD_SHARE:.0%}: mend "
                             "the data; the first of them: " + "; ".join(list(self.broken.values())[:5]))  # fmt: skip


def load_run_samples(
    config: RunConfig, world: World, *, has_boxes: bool
) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """(training samples, evaluation sets by name); the sets are --eval_data's files or what is held out."""
    options = {"has_boxes": has_boxes, "progress": world.first}
    sets = load_samples(config.data, config.image_root, **options)
    samples = [sample for part in sets for sample in part]
    if config.eval_data:
        eval_sets = load_samples(config.eval_data, config.eval_image_root, **options)
        names = [Path(path).stem for path in config.eval_data]
        names = names if len(set(names)) == len(names) else list(config.eval_data)
        return samples, dict(zip(names, eval_sets, strict=True))
    samples, held_out = split_held_out(samples, config.held_out, config.seed)
    return samples, {"held_out": held_out} if held_out else {}


# ---- checkpoints ---------------------------------------------------------------------------------------------------


class CheckpointKeeper:
    """Writes OUT/checkpoints/step-NNNNNN, keeps the newest few and the best, and points OUT/best at that one."""

    def __init__(
        self, out: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], config: RunConfig, world: World
    ):
        self.directory, self.link = out / "checkpoints", out / "best"
        self.model, self.optimizers, self.config, self.world = model, optimizers, config, world
        self.best: float | None = None  # the headline figure of the best model so far, the untrained one included

    def save(self, step: int, *, best: float | None = None) -> None:
        """Saves after that step; `best` is the score that makes it the best so far."""
        self.best = self.best if best is None else best
        path = self.directory / f"step-{step:06d}"
        state = {"step": step, "best": self.best}
        save_checkpoint(path, self.model, self.optimizers, state, self.world, source=self.config.model,
                        dtype=compute_dtype(self.config.dtype))  # fmt: skip
        if not self.world.first:
            return
        if best is not None:
            fresh = self.link.with_name(".best")
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(path.relative_to(self.link.parent))
            fresh.rename(self.link)
        kept = self.link.resolve() if self.link.is_symlink() else None
        for old in sorted(self.directory.glob("step-*"))[: -self.config.keep_checkpoints]:
            if old.resolve() != kept:
                shutil.rmtree(old)

    def after_step(self, step: int, score: float | None, *, last: bool) -> None:
        """Saves if the evaluation just made is the best so far, if a checkpoint is due, or if the run ends here."""
        if score is not None and (self.best is None or score > self.best):
            self.save(step, best=score)
        elif last or step % self.config.save_every == 0:
            self.save(step)

    def resume(self) -> int:
        """Restores the newest checkpoint; returns the steps it has behind it."""
        found = sorted(self.directory.glob("step-*"))
        if not found:
            raise ValueError(f"{self.directory}: no checkpoint to resume from; start the run anew")
        state = load_training_state(found[-1], self.model, self.optimizers, self.world)
        self.best = state["best"]
        return state["step"]


# ---- what a run tells ----------------------------------------------------------------------------------------------


class RunLog:
    """One flat dict per step: a line of metrics.jsonl, and tensorboard and wandb where asked for; rank 0 alone writes."""

    def __init__(self, out: Path, config: RunConfig, world: World, start_step: int):
        self.out, self.first, self.boards = out, world.first, []
        if not self.first:
            return
        for name in (
            "metrics.jsonl",
            "completions.jsonl",
            "eval.jsonl",
        ):  # a resumed run repeats what came after its checkpoint
            _drop_after(out / name, start_step)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(out / "tensorboard"), purge_step=start_step)
            self.boards.append(lambda step, figures: [board.add_scalar(k, v, step) for k, v in figures.items()])
        if config.wandb:
            import wandb

            wandb_run = wandb.init(project="nano-vlm-r1", name=out.name, config=asdict(config), dir=str(out))
            self.boards.append(lambda step, figures: wandb_run.log(figures, step=step))

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self.first:
            tqdm.write(text)

    def write(self, name: str, step: int, figures: dict, *, to_boards: bool = True) -> None:
        """Appends {"step": ..., **figures} to a file of the run."""
        if not self.first:
            return
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        for board in self.boards if to_boards else []:
            board(step, numbers)


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        lines = [
            line
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
            if json.loads(line)["step"] <= step
        ]
        path.write_text("".join(lines), encoding="utf-8")


@contextmanager
def timed(name: str, world: World) -> Iterator[dict[str, float]]:
    """Yields a dict that holds {"seconds_<name>": ...} once the block, and the device with it, is done."""
    result, start = {}, _clock(world)
    yield result
    result[f"seconds_{name}"] = _clock(world) - start


def _clock(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class StopSignal:
    """Set by the first SIGINT or SIGTERM, so that the step in progress is finished and saved; a second one stops at once."""

    def __init__(self):
        self.received = False
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def _receive(self, number: int, frame: object) -> None:
        self.received = True
        signal.signal(number, self.previous[number])

    def agreed(self, world: World) -> bool:
        """Whether any rank was told to stop; all ranks hear the same."""
        return all_sum({"stop": float(self.received)}, world, largest=True)["stop"] > 0


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far: the GPU's, or this process's where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux


def memory_estimate(model: nn.Module, world: World, config: RunConfig, *, reference: bool) -> dict[str, float]:
    """GB per GPU of what a step holds, by arithmetic; activations are the roughest of the terms."""
    text = model.config.get_text_config()
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for _, p in trainable(model))
    width = compute_dtype(config.dtype).itemsize
    layer_width = (
        2 * text.hidden_size if config.gradient_checkpointing else 14 * text.hidden_size + 4 * text.intermediate_size
    )
    terms = {
        "masters, gradients, moments": (4 * total + 12 * trained) / world.size,
        "whole copy while drawing": width * total if world.mesh is not None else 0,
        "reference": width * total / world.size if reference else 0,
        "activations of a row": config.row_tokens * text.num_hidden_layers * layer_width * width,
        "logits of a chunk": 3 * 4 * CHUNK_LOGITS,
    }
    return {name: size / 1e9 for name, size in terms.items()}


def describe_run(
    model: nn.Module,
    feed: PromptFeed,
    config: RunConfig,
    world: World,
    steps: int,
    *,
    completions: int,
    reference: bool,
) -> None:
    """Prints what `--dry_run` promises: sizes, lengths of 64 prompts spread over the data, an estimate of memory."""
    stride = max(1, len(feed.samples) // 64)
    prompts = [
        build_prompt(feed.processor, sample, family=feed.family, template=config.template)
        for sample in feed.samples[::stride]
    ]
    lengths = sorted(prompt.inputs["input_ids"].shape[1] for prompt in prompts)
    memory = memory_estimate(model, world, config, reference=reference)
    lines = [
        f"{len(feed.samples):,} samples; {config.prompts_per_step} prompts and {config.prompts_per_step * completions} completions a step; "
        f"{len(feed.samples) / config.prompts_per_step:,.1f} steps an epoch; {steps:,} steps",
        f"prompt tokens, images included, of {len(lengths)} samples: median {lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,}",
        f"{sum(p.numel() for _, p in trainable(model)):,} of {sum(p.numel() for p in model.parameters()):,} parameters trained, "
        f"{world.size} process(es)",
        f"estimated memory per process: {sum(memory.values()):.2f} GB",
        *(f"{size:10.2f} GB  {name}" for name, size in memory.items()),
    ]
    if world.first:
        print("\n".join(lines))
