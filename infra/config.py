"""The options of the three commands, grouped as `--help` shows them.

A group is a dataclass; a command's config inherits the groups it has. Everything contradictory is refused when a
config is made, before a model or a data file is opened. Numbers that follow from options are properties.
"""

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from data import template_text
from infra.mix import DataFile, check_file, file_names, read_mix
from infra.modelcheck import check_model
from infra.options import check_bounds, option
from infra.plugins import check_plugin
from model.families import MAX_PIXELS, MIN_PIXELS

BOX_SPACE = "space of the model's boxes: pixels of the resized image, or 0..1000; by default the family's own"


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    model: str = option("", "hub name or directory; without it the toy is trained, under its own options")
    freeze_vision: bool = option(False, "do not train the vision tower and its projector")
    lora_rank: int = option(
        0,
        "train adapters of this rank on all linear layers of the decoder, and nothing else, at\nten times the learning "
        "rate; 64 alone is a good start; 0 trains the weights",
        least=0,
    )
    lora_alpha: int = option(0, "adapters are scaled by alpha / rank; 0 means twice the rank", least=0)
    lora_dropout: float = option(0.0, "share of an adapter's inputs that training drops", least=0)
    lora_targets: list[str] = option(
        [], "names of the layers that get an adapter, as q_proj v_proj;\nby default every linear layer of the decoder"
    )


@dataclass(frozen=True)
class DataOptions:
    """Data."""

    data: str = option("", "training file: JSONL or JSON in VLM-R1's format, see docs/data.md")
    image_root: str = option("", "directory that image paths start from; by default that of the data file")
    mix: str = option("", "JSON file that describes several data files with a template, rewards\nand a share for each")
    allow_outside_root: bool = option(False, "use images that lie outside the image root")


@dataclass(frozen=True)
class PromptOptions:
    """Prompt and image."""

    template: str = option("rec", "name of a prompt template in data.py, or a text that holds {question}")
    max_pixels: int = option(MAX_PIXELS, "a larger image is shrunk to this many pixels")
    min_pixels: int = option(MIN_PIXELS, "a smaller image is enlarged to this many pixels", above=0)
    box_space: Literal["", "pixels", "thousand"] = option("", BOX_SPACE)
    max_completion_tokens: int = option(2048, "longest completion, in training and evaluation", above=0)


@dataclass(frozen=True)
class TrainingOptions:
    """Training."""

    steps: int = option(0, "optimizer steps to train; 0 means --epochs", least=0)
    epochs: float = option(1.0, "passes over the data, where --steps is 0", least=0)
    prompts_per_step: int = option(16, "prompts of an optimizer step, over all GPUs", above=0)
    cuda_graphs: Literal["auto", "off"] = option(
        "auto", "on a GPU, auto draws each token by one launch, after it has compared that with plain calls"
    )
    row_tokens: int | Literal["auto"] = option(
        "auto", "tokens of a packed row, the micro-batch; auto fills the GPU's memory, and is 8192 on a CPU", above=0
    )
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, a third more time")
    optimizer: Literal["adamw", "muon"] = option("adamw", "muon trains matrices; the rest gets AdamW at a tenth")
    learning_rate: float = option(1e-6, "peak learning rate; ten times the default with LoRA", above=0)
    schedule: Literal["constant", "linear", "cosine", "trapezoid"] = option(
        "constant", "after the warm-up: stay, fall to 0, or (trapezoid) fall over the last quarter"
    )
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0", least=0)
    weight_decay: float = option(0.0, "decoupled weight decay", least=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    max_bad_steps: int = option(5, "stop after this many steps in a row without a finite loss and gradient", above=0)


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluation."""

    eval_data: list[str] = option([], "evaluation files; the first decides which checkpoint is best")
    held_out: int = option(200, "without --eval_data: samples kept from training, at most a twentieth", least=0)
    eval_every: int = option(100, "steps between evaluations, besides one at the start; 0 means none", least=0)
    eval_limit: int = option(500, "samples of each evaluation set, drawn with the seed; 0 means all", least=0)
    eval_batch_size: int = option(32, "answers generated together in one process", above=0)


@dataclass(frozen=True)
class OutputOptions:
    """Output."""

    output_dir: str = option("", "directory of the run; by default runs/DATE-TIME")
    resume: str = option("", "directory of a run to continue from its newest checkpoint, under its options")
    save_every: int = option(100, "steps between checkpoints; the last step is always saved; 0 means off", least=0)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept, besides the best", above=0)
    report: bool = option(True, "write report.html, a page to look at, at each evaluation and at the end")
    log_every: int = option(10, "steps between the lines of a log file; a terminal shows a bar", above=0)
    tensorboard: bool = option(False, "also write the metrics for tensorboard")
    wandb: bool = option(False, "also send the metrics to wandb")
    dry_run: bool = option(
        False, "print what the run would do and need, draw eight samples with their boxes, then stop"
    )


@dataclass(frozen=True)
class MachineOptions:
    """Machine."""

    dtype: Literal["auto", "bf16", "fp32"] = option("auto", "compute in this; auto is bf16 on a GPU. Masters are fp32")
    shard_within_node: bool = option(False, "several nodes: shard inside each node and replicate across nodes")
    draw_sharded: bool = option(
        False, "generate layer by layer from the shards, slowly; automatic where a\nfull copy does not fit"
    )
    max_hours: float = option(0.0, "stop and save before a step that would end later than this; 0 means never", least=0)
    seed: int = option(0, "seed of the data order and of everything drawn", least=0)
    traceback: bool = option(False, "show the Python traceback of an error")


@dataclass(frozen=True)
class RunConfig(
    MachineOptions, OutputOptions, EvaluationOptions, TrainingOptions, PromptOptions, DataOptions, ModelOptions
):
    """What train.py and sft.py share."""

    GROUPS: ClassVar[tuple[type, ...]] = (
        ModelOptions, DataOptions, PromptOptions, TrainingOptions, EvaluationOptions, OutputOptions, MachineOptions
    )  # fmt: skip

    # What --lora_rank changes where the command line does not say otherwise. Ten times the rate of full training, as in
    # Thinking Machines' "LoRA Without Regret" (2025) and in VLM-R1's script.
    LORA_DEFAULTS: ClassVar[dict[str, float]] = {"learning_rate": 1e-5}

    # A resumed run may change these; any other option would make it another run. Paths, because a run may have moved.
    FREE_ON_RESUME: ClassVar[frozenset[str]] = frozenset(
        "resume steps epochs row_tokens cuda_graphs draw_batch_size gradient_checkpointing eval_every eval_limit "
        "eval_batch_size save_every keep_checkpoints log_completions_every log_every log_images report tensorboard "
        "wandb dry_run draw_sharded max_hours max_bad_steps on_reward_error reward_seconds traceback "
        "model data image_root mix eval_data allow_outside_root".split()
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.model:
            check_model(self.model)
        self._check_data()
        self._check_training()
        self._check_lora()
        for file in self.files:
            check_file(file)
        for board in ("tensorboard", "wandb"):
            if getattr(self, board) and importlib.util.find_spec(board) is None:
                raise ValueError(f"{board} is not installed: pip install {board}, or leave --{board} out")

    def _check_data(self) -> None:
        if not self.data and not self.mix:
            raise ValueError(
                f"no data for --model {self.model}: name a file with --data F.jsonl, or several with --mix"
            )
        if self.data and self.mix:
            raise ValueError(
                f"data {self.data} and mix {self.mix} are both given: the mix names all files, leave --data out"
            )
        if self.mix and self.eval_data:
            raise ValueError('eval_data is given beside a mix: name it as the "eval_file" of an entry of the mix')
        if self.max_pixels < self.min_pixels:
            raise ValueError(f"max_pixels {self.max_pixels} is below min_pixels {self.min_pixels}")
        template_text(self.template)

    def _check_training(self) -> None:
        if self.steps == 0 and self.epochs <= 0:
            raise ValueError(f"steps is 0 and epochs {self.epochs}: one of them must say how long to train")
        if self.steps and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leaves no step of {self.steps} after the warm-up")

    def _check_lora(self) -> None:
        if (Path(self.model) / "adapter_config.json").is_file():
            raise ValueError(
                f"model {self.model} is a LoRA adapter: merge it with python -m tools.merge {self.model} OUT and train "
                "OUT, or continue its run with --resume"
            )
        if not self.lora_rank:
            for name in ("lora_alpha", "lora_dropout", "lora_targets"):
                if value := getattr(self, name):
                    raise ValueError(f"{name} is {value} without LoRA: give a --lora_rank, or leave it out")
        if self.lora_dropout >= 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}: it must be below 1")

    def plain_file(self, rewards: list[str], weights: list[float]) -> DataFile:
        """What the plain options say about a data file."""
        return DataFile(
            name=Path(self.data).stem,
            file=self.data,
            image_root=self.image_root or (str(Path(self.data).parent) if self.data else ""),
            template=self.template,
            rewards=tuple(rewards),
            weights=tuple(weights or [1.0] * len(rewards)),
            eval_files=tuple(self.eval_data),
            eval_image_root=self.image_root,
        )

    def files_under(self, rewards: list[str], weights: list[float]) -> list[DataFile]:
        """The data files of the run; `rewards` and `weights` count where a mix has none."""
        plain = self.plain_file(rewards, weights)
        return read_mix(self.mix, plain) if self.mix else [plain]

    @cached_property
    def files(self) -> list[DataFile]:
        """The data files of the run, and what is done with each."""
        raise NotImplementedError

    @property
    def shares(self) -> list[float]:
        """How much each file gives to a step; empty where their sizes decide."""
        return [file.share for file in self.files] if self.files[0].share else []

    @cached_property
    def evaluated(self) -> dict[str, DataFile]:
        """Every training and evaluation file by name, with the data file under whose template it is evaluated."""
        known = {file.name: file for file in self.files}
        pairs = [(path, file) for file in self.files for path in file.eval_files]
        names = file_names([path for path, _ in pairs])
        return known | {name: file for name, (_, file) in zip(names, pairs, strict=True)}


@dataclass(frozen=True)
class AlgorithmOptions:
    """Algorithm."""

    rewards: list[str] = option(
        ["iou", "rec_format"],
        "names in rewards.py, or file.py:function; the first is the accuracy reward,\n"
        "which a sample's own accu_reward_method replaces",
    )
    reward_weights: list[float] = option([], "weight of each reward; by default all 1")
    group_size: int = option(8, "completions of each prompt", least=2)
    num_iterations: int = option(1, "optimizer passes over the completions of a step", least=1)
    variant: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo"] = option(
        "grpo", "how ratios are clipped and tokens averaged, see docs/training.md"
    )
    advantages: Literal["group", "gdpo"] = option(
        "group", "compare the sum of the rewards in each group; gdpo: compare each reward by itself,\nthen sum"
    )
    scale_advantages: bool | None = option(
        None, "divide advantages by the group's standard deviation; by default yes,\nexcept under dr_grpo"
    )
    refill: Literal["", "rewards", "accuracy"] = option(
        "", "draw other prompts in place of groups whose completions all earn the same rewards,\nor the same accuracy"
    )
    refill_rounds: int = option(3, "with --refill: at most so many further rounds of drawing in a step", above=0)
    mask_truncated: bool = option(False, "keep completions that the length limit cuts off out of the loss")
    beta: float = option(
        0.04, "weight of the KL penalty; at 0, with LoRA or with --ref_every no second model is loaded", least=0
    )
    ref_every: int = option(
        0, "the reference of the KL penalty becomes the policy every so many steps; 0: it stays", least=0
    )
    clip_low: float = option(0.2, "the ratio is clipped below 1 minus this", above=0)
    clip_high: float = option(0.2, "the ratio is clipped above 1 plus this", above=0)
    on_reward_error: Literal["stop", "zero"] = option(
        "stop", "if your reward raises, hangs or returns no finite number: stop, or score 0"
    )
    reward_seconds: float = option(10.0, "time limit of a call of your own reward; 0 means none", least=0)


@dataclass(frozen=True)
class DrawingOptions:
    """Drawing completions."""

    temperature: float = option(1.0, "temperature of the distribution that is drawn from and trained", above=0)
    top_k: int = option(0, "draw among the k most likely tokens; 0 means all", least=0)
    top_p: float = option(1.0, "draw among the most likely tokens that hold this probability", above=0)
    draw_batch_size: int = option(512, "completions generated together in one process; bounds the cache", above=0)
    log_completions_every: int = option(10, "steps between groups written to completions.jsonl", least=1)
    log_images: bool = option(False, "also send these groups with their boxes to tensorboard and wandb, as images")


@dataclass(frozen=True)
class TrainConfig(DrawingOptions, AlgorithmOptions, RunConfig):
    """GRPO on a Hugging Face vision-language model. Without options it trains the toy on this machine."""

    GROUPS: ClassVar[tuple[type, ...]] = (
        *RunConfig.GROUPS[:4],
        AlgorithmOptions,
        DrawingOptions,
        *RunConfig.GROUPS[4:],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix and self.reward_weights:
            raise ValueError(f'reward_weights are {self.reward_weights} beside a mix: give its entries "weights"')
        if self.log_images and not (self.tensorboard or self.wandb):
            raise ValueError("log_images is given and nothing takes images: add --tensorboard or --wandb")
        if self.advantages == "gdpo" and self.scale_advantages is not None:
            raise ValueError(
                f"scale_advantages is {self.scale_advantages} beside advantages gdpo, which always divides: "
                "leave it out"
            )
        if self.ref_every and not self.beta:
            raise ValueError(f"ref_every is {self.ref_every} and beta is 0: without a penalty there is no reference")
        if self.clip_low >= 1:
            raise ValueError(f"clip_low is {self.clip_low}: it must be below 1")
        if self.top_p > 1:
            raise ValueError(f"top_p is {self.top_p}: it must be at most 1")

    @cached_property
    def files(self) -> list[DataFile]:
        """The data files of the run, and what is done with each."""
        return self.files_under(self.rewards, self.reward_weights)

    @cached_property
    def reward_names(self) -> list[str]:
        """The rewards of all files, each once: the columns of a rollout's rewards."""
        return list(dict.fromkeys(spec for file in self.files for spec in file.rewards))

    @property
    def divides_by_deviation(self) -> bool:
        """Whether advantages are divided by the group's standard deviation; Dr. GRPO (arXiv 2503.20783) does not."""
        return self.variant != "dr_grpo" if self.scale_advantages is None else self.scale_advantages

    @property
    def completions_per_step(self) -> int:
        """N of a step, over all ranks."""
        return self.prompts_per_step * self.group_size

    @property
    def needs_reference_model(self) -> bool:
        """Whether the KL penalty needs a second set of weights; LoRA has its reference with the adapters off."""
        return self.beta > 0 and not self.lora_rank


@dataclass(frozen=True)
class ImitationOptions:
    """Supervised fine-tuning."""

    learning_rate: float = option(
        1e-5, "peak learning rate, ten times the default with LoRA; the paper uses 1e-6", above=0
    )
    response: str = option(
        "<answer>{answer}</answer>",
        "text to imitate: {answer} and, if wanted, {question} or a text field of the record",
    )
    reward: str = option("iou", "reward that evaluation reports, where the data names none")


@dataclass(frozen=True)
class SftConfig(ImitationOptions, RunConfig):
    """Supervised fine-tuning, the baseline of the paper. Without options it trains the toy on this machine."""

    GROUPS: ClassVar[tuple[type, ...]] = (ImitationOptions, *RunConfig.GROUPS)
    LORA_DEFAULTS: ClassVar[dict[str, float]] = {"learning_rate": 1e-4}

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{answer}" not in self.response:
            raise ValueError(f"response {self.response!r} lacks {{answer}}: there would be nothing to learn")

    @cached_property
    def files(self) -> list[DataFile]:
        """The data files of the run; evaluation reports the first reward of each."""
        return self.files_under([self.reward], [])


@dataclass(frozen=True)
class AnswerOptions:
    """Options."""

    model: str = option("", "hub name or directory of a model or an adapter; by default the toy's start")
    data: list[str] = option([], "data files: VLM-R1's evaluation JSON or training JSONL")
    image_root: str = option("", "directory that image paths start from; by default that of each data file")
    mix: str = option("", "JSON file that describes several data files; the eval_file of each is evaluated")
    allow_outside_root: bool = option(False, "use images that lie outside the image root")
    task: Literal["", "rec", "detection", "text"] = option(
        "", "rec: one box an answer (the default); detection: lists of boxes;\ntext: the mean of --reward"
    )
    reward: str = option("default", "reward of task text, where the data names none")
    template: str = option("", "name of a prompt template in data.py, or a text that holds {question}; rec by default")
    max_completion_tokens: int | None = option(None, "longest answer; 256 by default", above=0)
    max_pixels: int | None = option(None, f"a larger image is shrunk to this many pixels; {MAX_PIXELS:,} by default")
    min_pixels: int | None = option(
        None, f"a smaller image is enlarged to this many pixels; {MIN_PIXELS:,} by default", above=0
    )
    box_space: Literal["", "pixels", "thousand"] = option("", BOX_SPACE)
    limit: int = option(0, "evaluate this many samples of each file, drawn with --seed; 0 means all", least=0)
    seed: int | None = option(None, "seed of that draw; by default the run's, else 42 as in VLM-R1", least=0)
    batch_size: int = option(32, "answers generated together in one process", above=0)
    dtype: Literal["auto", "bf16", "fp32"] = option("auto", "compute in this; auto is bf16 on a GPU")
    draw_sharded: bool = option(False, "generate layer by layer from the shards, for a model that fits no single GPU")
    output: str = option("", "write the summary and a row for each sample to this JSON file")
    predictions: str = option("", "score the answers in such a file again, without a model")
    compare: list[str] = option([], "two such files: print the paired differences with their intervals")
    traceback: bool = option(False, "show the Python traceback of an error")


@dataclass(frozen=True)
class EvalConfig(AnswerOptions):
    """Evaluate a model, an adapter or a checkpoint of a run. Without options it evaluates the toy's start.

    A checkpoint of a run is evaluated under the template, pixels, length and seed of that run, unless told otherwise.
    """

    GROUPS: ClassVar[tuple[type, ...]] = (AnswerOptions,)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.model and not (self.predictions or self.compare):
            check_model(self.model)
        if self.task == "text":
            check_plugin(self.reward)
        if self.compare and len(self.compare) != 2:
            raise ValueError(f"compare names {len(self.compare)} files: two are compared")
        if not (self.data or self.mix or self.predictions or self.compare):
            raise ValueError(f"no data for --model {self.model}: name files with --data, or with --mix")
        if self.data and self.mix:
            raise ValueError("data and mix are both given: the mix names the files, leave --data out")
        if self.template:
            template_text(self.template)
        for path in (*self.compare, self.predictions):
            if path and not Path(path).is_file():
                raise ValueError(f"{path}: no such file; a file that eval.py --output wrote is expected")
        if self.output and Path(self.output).is_dir():
            raise ValueError(f"output {self.output} is a directory: give the path of a file")
        if self.output and not Path(self.output).resolve().parent.is_dir():
            raise ValueError(
                f"output {self.output}: its directory does not exist; make it first, or the answers are lost"
            )
