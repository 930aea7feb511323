"""The options that train.py and sft.py share, and how a command line becomes them.

An option is a dataclass field: the command line, `--help`, config.json and the code have the same names, and what no
code reads does not exist. What is unknown or contradictory is refused before anything is loaded.
"""

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

import toy
import toy.scenes
from data import template_text
from model.lora import is_adapter
from model.vlm import MAX_PIXELS
from rewards import load_reward, reads_boxes

# Options that another value than the saved one may be given for when a run is resumed; the others make it another run.
FREE_ON_RESUME = frozenset(
    "resume steps epochs row_tokens draw_batch_size gradient_checkpointing eval_every eval_limit eval_batch_size "
    "save_every keep_checkpoints log_completions_every tensorboard wandb dry_run draw_sharded "
    "max_hours max_bad_steps on_reward_error reward_seconds "
    # paths: a run may have moved
    "model data image_root eval_data eval_image_root eval_like allow_outside_root".split()
)


@dataclass(frozen=True)
class Task:
    """What a run does with the samples of one data file."""

    name: str
    template: str
    rewards: tuple[str, ...]  # the first is the accuracy reward
    weights: tuple[float, ...]
    has_boxes: bool  # whether a truth of four numbers is a box


@dataclass(frozen=True)
class RunConfig:
    model: str = HfArg(
        default=str(toy.MODEL), help="hub name or directory; without it the toy is trained, under its preset"
    )
    data: list[str] = HfArg(default_factory=list, help="training files in VLM-R1's JSONL format")
    image_root: list[str] = HfArg(
        default_factory=list, help="image directory of each data file, or one for all; the file's own by default"
    )
    allow_outside_root: bool = HfArg(
        default=False, help="use images that .., a link or an absolute path leads out of their image root to"
    )
    template: str = HfArg(default="rec", help="prompt template: a name of data.TEMPLATES or a text with {question}")
    file_templates: list[str] = HfArg(default_factory=list, help="instead of --template: one for each data file")
    file_rewards: list[str] = HfArg(
        default_factory=list,
        help='instead of --rewards: one text for each data file, as "iou rec_format" "math format"',
    )
    file_shares: list[float] = HfArg(
        default_factory=list, help="how many samples each data file gives relative to the others; by default its size"
    )
    max_pixels: int = HfArg(default=MAX_PIXELS, help="pixels of an image at most; a larger one is shrunk")
    min_pixels: int = HfArg(default=3136, help="pixels of an image at least; a smaller one is enlarged")
    box_space: Literal["", "pixels", "thousand"] = HfArg(
        default="", help="where boxes live: pixels of the resized image, or 0..1000; the family's own by default"
    )
    trust_remote_code: bool = HfArg(default=False, help="run the code that a checkpoint brings along")
    freeze_vision: bool = HfArg(default=False, help="leave the vision tower and its projector as they are")
    train_projector: bool = HfArg(default=False, help="but train the projector: with freeze_vision, or beside LoRA")
    lora_rank: int = HfArg(default=0, help="train adapters of this rank and nothing else; 0 trains the weights")
    lora_alpha: int = HfArg(default=0, help="adapters count alpha / rank; 0 for twice the rank")
    lora_dropout: float = HfArg(default=0.0, help="share of an adapter's inputs dropped in training, never in drawing")
    lora_targets: list[str] = HfArg(
        default_factory=list,
        help="layers with an adapter, as names (q_proj v_proj) or regular expressions of whole names; by default every "
        "linear layer of the language model's decoder",
    )
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, a third more time")
    dtype: Literal["auto", "bf16", "fp32"] = HfArg(
        default="auto", help="compute in; auto is bf16 on a GPU. Masters are fp32"
    )
    shard_within_node: bool = HfArg(default=False, help="several nodes: shard within each, replicate across (HSDP)")
    draw_sharded: bool = HfArg(
        default=False, help="draw from sharded layers, slowly; done unasked where a whole copy does not fit a GPU"
    )
    prompts_per_step: int = HfArg(default=16, help="prompts per optimizer step, over all GPUs")
    row_tokens: str = HfArg(
        default="8192", help="tokens of a packed row, the micro-batch: the knob for memory; auto finds what fits"
    )
    steps: int = HfArg(default=0, help="steps to train; 0 for --epochs")
    epochs: float = HfArg(default=1.0, help="passes over the data, where --steps is 0")
    optimizer: Literal["adamw", "muon"] = HfArg(
        default="adamw", help="muon: on the matrices, AdamW at a tenth on the rest"
    )
    learning_rate: float = HfArg(default=1e-6, help="peak learning rate")
    vision_learning_rate: float = HfArg(default=0.0, help="that of the vision tower and projector; 0 for the same")
    schedule: Literal["constant", "linear", "cosine", "trapezoid"] = HfArg(
        default="constant", help="after the warm-up: stay, fall to 0, or (trapezoid) fall over the last quarter"
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
    eval_like: list[str] = HfArg(
        default_factory=list,
        help="name of the data file whose template and reward each evaluation file takes; by default their order",
    )
    max_bad_steps: int = HfArg(
        default=5, help="steps in a row whose loss or gradient is not finite, after which the run stops"
    )
    on_reward_error: Literal["stop", "zero"] = HfArg(
        default="stop", help="where a reward of yours raises, hangs or gives no finite number: stop, or score 0"
    )
    reward_seconds: float = HfArg(default=10.0, help="after which a reward of yours counts as hanging; 0 for never")
    held_out: int = HfArg(
        default=200, help="without eval_data: samples of each file kept from training, at most a twentieth of them"
    )
    eval_every: int = HfArg(default=100, help="steps between evaluations; one comes before the first step; 0 for none")
    eval_limit: int = HfArg(default=500, help="samples of each evaluation set, drawn with the seed; 0 for all")
    eval_batch_size: int = HfArg(default=32, help="answers decoded together per process")
    save_every: int = HfArg(default=100, help="steps between checkpoints; the last step is saved always")
    keep_checkpoints: int = HfArg(default=2, help="newest checkpoints kept, besides the best")
    seed: int = HfArg(default=0, help="of the data order and of what is drawn")
    output_dir: str = HfArg(default="", help="where the run is written; runs/DATE-TIME by default")
    resume: str = HfArg(default="", help="output directory of a run to go on with, under the options saved there")
    max_hours: float = HfArg(
        default=0.0, help="stop and save before a step that would end later than this after the start; 0 for never"
    )
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
                raise ValueError(
                    f"{given} {roots} for {files} files in {data}: give one for all, one for each, or none"
                )
        for name in (
            "prompts_per_step",
            "max_completion_tokens",
            "eval_batch_size",
            "save_every",
            "keep_checkpoints",
            "learning_rate",
            "max_grad_norm",
            "max_bad_steps",
            "min_pixels",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.row_tokens != "auto" and not (self.row_tokens.isdigit() and int(self.row_tokens) > 0):
            raise ValueError(f"row_tokens is {self.row_tokens!r}: a number of tokens above 0, or auto, is expected")
        for name in (
            "steps",
            "warmup_steps",
            "weight_decay",
            "held_out",
            "eval_every",
            "eval_limit",
            "max_hours",
            "reward_seconds",
            "seed",
            "vision_learning_rate",
            "lora_rank",
            "lora_alpha",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.steps == 0 and self.epochs <= 0:
            raise ValueError(f"steps is 0 and epochs {self.epochs}: one of them must say how long to train")
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"max_pixels {self.max_pixels} is below min_pixels {self.min_pixels}")
        if self.steps and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leaves nothing of {self.steps} steps")
        for board in ("tensorboard", "wandb"):
            if getattr(self, board) and importlib.util.find_spec(board) is None:
                raise ValueError(
                    f"{board} is asked for and not installed: pip install {board}, or leave the option out"
                )
        self._check_what_is_trained()
        template_text(self.template)
        self._check_files()

    def _check_files(self) -> None:
        check_per_file(
            self.data,
            file_templates=self.file_templates,
            file_rewards=self.file_rewards,
            file_shares=self.file_shares,
        )
        for template in self.file_templates:
            template_text(template)
        for rewards in self.file_rewards:
            if not rewards.split():
                raise ValueError('file_rewards holds "": name at least one reward for each data file')
            for spec in rewards.split():
                load_reward(spec)
        if not all(0 < share < math.inf for share in self.file_shares):
            raise ValueError(
                f"file_shares are {self.file_shares}: each must be above 0; drop a file that gives nothing"
            )
        if len(self.eval_like) not in (0, len(self.eval_data)):
            raise ValueError(
                f"{len(self.eval_like)} eval_like for {len(self.eval_data)} files in eval_data: give one for each"
            )
        names = file_names(self.data)
        if unknown := [name for name in self.eval_like if name not in names]:
            raise ValueError(f"eval_like {unknown[0]!r} is none of the data files: {', '.join(names)}")
        differ = len(set(self.file_templates)) > 1 or len(set(self.file_rewards)) > 1
        if differ and not self.eval_like and len(self.eval_data) not in (0, len(self.data)):
            raise ValueError(
                f"{len(self.eval_data)} files in eval_data for {len(self.data)} in data, which differ in template or "
                f"rewards: say with --eval_like which each is evaluated like, as: {names[0]}"
            )

    def tasks_under(self, rewards: Sequence[str], weights: Sequence[Sequence[float]]) -> list[Task]:
        """A task for each data file; `rewards` where no file has its own, all 1 where there are no `weights`."""
        tasks = []
        for number, name in enumerate(file_names(self.data)):
            own = tuple(self.file_rewards[number].split() if self.file_rewards else rewards)
            tasks.append(
                Task(
                    name=name,
                    template=self.file_templates[number] if self.file_templates else self.template,
                    rewards=own,
                    weights=tuple(weights[number]) if weights else (1.0,) * len(own),
                    has_boxes=any(map(reads_boxes, own)),
                )
            )
        return tasks

    @property
    def known_files(self) -> dict[str, dict]:
        """Template and accuracy reward of each data and evaluation file by name; eval.py reads it in config.json."""
        tasks = self.tasks
        known = {task.name: task for task in tasks}
        known |= {name: tasks[file] for name, file in zip(file_names(self.eval_data), self.eval_files, strict=True)}
        return {name: {"template": task.template, "reward": task.rewards[0]} for name, task in known.items()}

    @property
    def eval_files(self) -> list[int]:
        """The number of the data file that each evaluation file is evaluated like."""
        names = file_names(self.data)
        if self.eval_like:
            return [names.index(name) for name in self.eval_like]
        same = len(self.eval_data) == len(self.data)
        return list(range(len(self.data))) if same else [0] * len(self.eval_data)

    def _check_what_is_trained(self) -> None:
        if is_adapter(self.model):
            raise ValueError(
                f"model {self.model} is a LoRA adapter: merge it first, python lora.py merge {self.model} OUT, and "
                "train OUT; to go on with its run, --resume that"
            )
        if not self.lora_rank:
            for name in ("lora_alpha", "lora_dropout", "lora_targets"):
                if value := getattr(self, name):
                    raise ValueError(f"{name} is {value} without LoRA: give a --lora_rank, or leave it out")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}: 0 <= lora_dropout < 1 is expected")
        if self.train_projector and not (self.freeze_vision or self.lora_rank):
            raise ValueError(
                "train_projector is set where all is trained: add --freeze_vision or --lora_rank, or leave it out"
            )
        frozen = (self.freeze_vision or (self.lora_rank and not self.lora_targets)) and not self.train_projector
        if self.vision_learning_rate and frozen:
            raise ValueError(
                f"vision_learning_rate is {self.vision_learning_rate} where nothing of the vision tower is trained: "
                "add --train_projector, or leave it out"
            )


def file_names(paths: Sequence[str]) -> list[str]:
    """What files are called in options, log and evaluation: without directory and suffix, unless two were the same."""
    names = [Path(path).stem for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def check_per_file(files: Sequence[str], **options: Sequence) -> None:
    """Refuses an option that is given for another number of files than there are."""
    for name, values in options.items():
        if len(values) not in (0, len(files)):
            raise ValueError(f"{len(values)} {name} for {len(files)} files in data: give one for each, in their order")


def parse_options(config_class: type, argv: Sequence[str], preset: dict, defaults_of: Callable | None = None):
    """The options of an entry point from the command line; unknown ones are an error.

    Without --model the preset of the toy stands in for the defaults; with --resume the run's saved options do; else
    those that `defaults_of` finds for the options given.
    """
    parser = HfArgumentParser(config_class, allow_abbrev=False)
    given = _given_options(config_class, argv)
    if given.get("resume"):
        saved = _saved_options(Path(given["resume"]), config_class)
        for name, value in given.items():
            if name not in FREE_ON_RESUME and value != saved[name]:
                raise ValueError(
                    f"{name} was {saved[name]!r} in the run resumed and is {value!r} now: leave it out, "
                    "or start a new run"
                )
        parser.set_defaults(**saved)
    elif "model" not in given:
        toy.scenes.write_data()
        parser.set_defaults(**preset)
    elif defaults_of is not None:
        parser.set_defaults(**defaults_of(given))
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
    try:
        saved = json.loads(path.read_text())["options"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): start a new run, or write the file anew") from None
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
