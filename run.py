"""The life of a run, the same for train.py and sft.py: samples, optimizer, log, checkpoints, and how it stops.

Nothing here knows rewards or losses.
"""

import copy
import hashlib
import itertools
import json
import math
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ProcessorMixin
from transformers.utils import cached_file

from data import BadSample, Sample, check_samples, mixed_indices, read_samples, step_indices
from grpo import CHUNK_LOGITS
from lora import add_adapters, choose_layers
from options import RunConfig, compute_dtype, file_names
from parallel import (
    SaveFailed,
    World,
    all_gather,
    all_sum,
    barrier,
    load_training_state,
    remove_directory,
    save_checkpoint,
    shard_model,
    sync_file,
    write_text_safely,
)
from rollout import plan_rows
from vlm import (
    DECODER_LAYERS,
    Prompt,
    build_prompt,
    describe_processor,
    is_within,
    load_model,
    projector_modules,
    trainable,
    vision_modules,
)

ACTIVATIONS = "activations of a row"
MIN_ROW_TOKENS, MAX_ROW_TOKENS = 256, 65_536  # between which --row_tokens auto looks
Result = TypeVar("Result")
MAX_COMPLETIONS_BYTES = 64_000_000  # then completions.jsonl becomes completions.1.jsonl, in place of the one before
LOGS = (
    "metrics.jsonl", "completions.jsonl", "completions.1.jsonl", "eval.jsonl", "bad_samples.jsonl", "bad_steps.jsonl"
)  # fmt: skip
ONE_KEYSTROKE = 0.5  # seconds within which a second Ctrl-C is the first one heard twice
MAX_BAD_SHARE = 0.01  # of the samples used; more than that is a broken data set, not a broken file


def open_run(config: RunConfig, world: World) -> Path:
    """The output directory, made; refuses one that holds another run."""
    name = config.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(all_gather([name], world)[0])  # the clocks of the ranks may differ
    if not config.resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} holds a run: give another --output_dir, or --resume {out} to go on with it")
    if world.first:
        out.mkdir(parents=True, exist_ok=True)
    return out


def load_policy(config: RunConfig, world: World) -> tuple[nn.Module, ProcessorMixin]:
    """The model to train, sharded, and its processor: fp32 masters of what is trained, the rest as it computes."""
    if config.prompts_per_step < world.size:
        raise ValueError(
            f"prompts_per_step {config.prompts_per_step} is below the {world.size} processes: each needs a prompt"
        )
    dtype = compute_dtype(config.dtype)
    model, processor = load_model(
        config.model,
        dtype=dtype if config.lora_rank else torch.float32,
        max_pixels=config.max_pixels,
        min_pixels=config.min_pixels,
        freeze_vision=config.freeze_vision,
        gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
        empty=config.dry_run or not world.first,
    )
    if world.first:
        tqdm.write(describe_processor(processor, config.box_space))
    choose_trained(model, config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    if config.dry_run:  # sizes are all it tells, and a config has them: no weights are loaded
        return model, processor
    return shard_model(model, world, compute_dtype=dtype), processor


def choose_trained(model: nn.Module, config: RunConfig) -> None:
    """Puts adapters on the model and freezes all else where LoRA is on; frees the projector where that is asked for."""
    if config.lora_rank:
        layers = choose_layers(model, config.lora_targets)
        vision, projector = vision_modules(model), projector_modules(model)
        if config.freeze_vision and (seen := [name for name in layers if is_within(name, vision)]):
            raise ValueError(f"lora_targets mean {seen[0]}, which freeze_vision freezes: leave one of the two out")
        if config.train_projector and (seen := [name for name in layers if is_within(name, projector)]):
            raise ValueError(f"lora_targets mean {seen[0]}, all of which train_projector trains: leave one out")
        model.requires_grad_(False)
        add_adapters(
            model,
            layers,
            rank=config.lora_rank,
            alpha=config.lora_alpha or 2 * config.lora_rank,
            dropout=config.lora_dropout,
            seed=config.seed,
        )
    if config.train_projector:
        for name in projector_modules(model):
            model.get_submodule(name).requires_grad_(True)


def load_reference(config: RunConfig, world: World) -> nn.Module:
    """The frozen model that the KL penalty measures from: the one training started with, in the compute dtype."""
    dtype = compute_dtype(config.dtype)
    model, _ = load_model(config.model, dtype=dtype, trust_remote_code=config.trust_remote_code, empty=not world.first)
    return shard_model(model.requires_grad_(False), world, compute_dtype=dtype, trained=False)


# ---- optimizer -----------------------------------------------------------------------------------------------------


def make_optimizers(model: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """AdamW over all trained parameters; or Muon over the matrices and AdamW, at a tenth of its rate, over the rest.

    The vision tower's are groups of their own where it has its own learning rate.
    """
    head = model.get_output_embeddings().weight
    embeddings = model.get_input_embeddings().weight
    named, modules = trainable(model), vision_modules(model) if config.vision_learning_rate else []
    vision = {id(p) for name, p in named if is_within(name, modules)}
    if config.vision_learning_rate and not vision:
        raise ValueError(
            f"vision_learning_rate is {config.vision_learning_rate} where nothing of the vision tower is trained: "
            "leave it out"
        )

    def groups(parameters: list[nn.Parameter], share: float = 1.0) -> list[dict]:
        own = [p for p in parameters if id(p) in vision]
        other = [p for p in parameters if id(p) not in vision]
        rates = [(other, config.learning_rate), (own, config.vision_learning_rate)]
        return [{"params": part, "lr": rate * share} for part, rate in rates if part]

    parameters = [parameter for _, parameter in named]
    adamw = {"weight_decay": config.weight_decay, "fused": parameters[0].is_cuda}
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(groups(parameters), **adamw)]
    matrices = [p for p in parameters if p.ndim == 2 and p is not head and p is not embeddings]
    taken = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in taken]
    muon = torch.optim.Muon(groups(matrices), weight_decay=config.weight_decay)
    return [muon, torch.optim.AdamW(groups(rest, 0.1), **adamw)] if rest else [muon]  # adapters are all matrices


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: str) -> float:
    """What the peak learning rate is multiplied by in a step counted from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    factors = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "trapezoid": min(1.0, 4 * (1 - progress)),
    }
    return factors[schedule]


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> float:
    """Scales every group's rate from the one it was made with; returns the first group's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return optimizers[0].param_groups[0]["lr"]


def seed_step(config: RunConfig, step: int, world: World) -> torch.Generator:
    """Seeds all that is random in a step, rewards included; returns the generator that completions are drawn with.

    A function of seed, step and rank: no random state to save, and no two ranks draw the same.
    """
    seed = (config.seed * 1_000_003 + step) * 65_537 + world.rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return torch.Generator(world.device).manual_seed(seed)


def total_steps(config: RunConfig, num_samples: int) -> int:
    """--steps, or the steps that --epochs come to."""
    steps = config.steps or math.ceil(config.epochs * num_samples / config.prompts_per_step)
    if config.warmup_steps >= steps:
        raise ValueError(f"warmup_steps {config.warmup_steps} leaves nothing of {steps} steps")
    return steps


# ---- samples -------------------------------------------------------------------------------------------------------


def load_samples(
    files: Sequence[str],
    roots: Sequence[str],
    *,
    has_boxes: Sequence[bool],  # of each file, as read_samples takes it
    progress: bool,
    allow_outside_root: bool = False,
    numbers: Sequence[int] | None = None,  # of the data files that these are, or are evaluated like
) -> list[list[Sample]]:
    """The checked samples of each file."""
    numbers = range(len(files)) if numbers is None else numbers
    sets = [
        read_samples(path, root, has_boxes=boxes, allow_outside_root=allow_outside_root, file=number)
        for path, root, boxes, number in zip(files, _roots_of(files, roots), has_boxes, numbers, strict=True)
    ]
    check_samples([sample for samples in sets for sample in samples], progress=progress)
    return sets


def _roots_of(files: Sequence[str], roots: Sequence[str]) -> list[str | Path]:
    return [roots[number % len(roots)] if roots else Path(path).parent for number, path in enumerate(files)]


def seeded_sample(samples: list[Sample], limit: int, seed: int) -> list[Sample]:
    """The first `limit` (0: all) after a seeded shuffle, as VLM-R1 draws its 2,000 with seed 42."""
    if not 0 < limit < len(samples):
        return samples
    shuffled = list(samples)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:limit]


def split_held_out(samples: list[Sample], held_out: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(for training, held out): a seeded draw of at most a twentieth; the same on every rank and on resume."""
    count = min(held_out, len(samples) // 20)
    chosen = set(random.Random(seed).sample(range(len(samples)), count))
    return [s for i, s in enumerate(samples) if i not in chosen], [s for i, s in enumerate(samples) if i in chosen]


class PromptFeed:
    """The prompts of each step, this rank's share, prepared in a thread one step ahead.

    Samples that turn out broken are set aside, named and replaced by the next.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: ProcessorMixin,
        config: RunConfig,
        world: World,
        log: Path,
        steps: int,  # of the run; nothing is prepared beyond
        start: int = 0,  # steps done before this process
    ):
        self.samples, self.config, self.world, self.log, self.steps = samples, config, world, log, steps
        self.sizes = list(Counter(sample.file for sample in samples).values())  # they follow each other file by file
        self.processor = copy.deepcopy(processor)  # a tokenizer in use by two threads at once may raise
        self.broken: dict[int, str] = {}  # sample -> reason
        self.step = start
        self.used = start * len(range(world.rank, config.prompts_per_step, world.size))
        self._restore()
        self.num_broken = len(self.broken)  # of the steps taken, without what the thread has found ahead of them
        self.thread = ThreadPoolExecutor(1)
        self.ahead: tuple[int, Future] | None = None

    def _restore(self) -> None:
        """What was set aside before a resume; the ranks of then may be more or fewer than those of now."""
        places = {(sample.source, sample.id): index for index, sample in enumerate(self.samples)}
        for row in read_rows(self.log):
            index = places.get((row["source"], row["id"]))
            if index is not None and row["rank"] % self.world.size == self.world.rank:
                self.broken[index] = row["reason"]

    def figures(self) -> dict[str, float]:
        """How many samples were set aside on all ranks so far."""
        return all_sum({"bad_samples": float(self.num_broken)}, self.world)

    def take(self, step: int) -> list[Prompt]:
        """The prompts of a step, every world.size-th from this rank on; those of the next are begun."""
        if self.ahead is None or self.ahead[0] != step:
            self.ahead = step, self.thread.submit(self._prepare, step)
        prompts, self.num_broken = self.ahead[1].result()
        self.ahead = (step + 1, self.thread.submit(self._prepare, step + 1)) if step + 1 < self.steps else None
        return prompts

    def _prepare(self, step: int) -> tuple[list[Prompt], int]:
        self.step = step
        place = self.config.prompts_per_step, step, self.config.seed
        if self.config.file_shares:
            indices = mixed_indices(self.sizes, self.config.file_shares, *place)
        else:
            indices = step_indices(len(self.samples), *place)
        return [self._build(index) for index in indices[self.world.rank :: self.world.size]], len(self.broken)

    def _build(self, index: int) -> Prompt:
        """The prompt of that sample, or of the next one that is not broken."""
        self.used += 1
        while True:
            if index not in self.broken:
                try:
                    sample = self.samples[index]
                    template = self.config.tasks[sample.file].template
                    return build_prompt(self.processor, sample, template=template, box_space=self.config.box_space)
                except BadSample as error:
                    self._set_aside(index, error)
            index = (index + 1) % len(self.samples)

    def _set_aside(self, index: int, error: BadSample) -> None:
        self.broken[index] = str(error)
        sample = self.samples[index]
        tqdm.write(f"warning: {sample.source} is set aside: {error}")
        place = {"step": self.step + 1, "rank": self.world.rank}
        append_rows(self.log, [place | {"source": sample.source, "id": sample.id, "reason": str(error)}])
        if len(self.broken) > max(2, MAX_BAD_SHARE * self.used):
            raise ValueError(
                f"{len(self.broken)} of {self.used} samples used are broken, more than {MAX_BAD_SHARE:.0%}: mend the "
                f"data; they are named in {self.log}, the last one: {error}"
            )


def load_run_samples(config: RunConfig, world: World) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """(training samples, evaluation sets by name); the sets are --eval_data's files or what is held out of each."""
    options = {"progress": world.first, "allow_outside_root": config.allow_outside_root}
    boxes = [task.has_boxes for task in config.tasks]
    sets = load_samples(config.data, config.image_root, has_boxes=boxes, **options)
    if config.eval_data:
        like = config.eval_files
        options |= {"has_boxes": [boxes[number] for number in like], "numbers": like}
        eval_sets = load_samples(config.eval_data, config.eval_image_root, **options)
        eval_sets = [seeded_sample(part, config.eval_limit, config.seed) for part in eval_sets]
        return [sample for part in sets for sample in part], dict(
            zip(file_names(config.eval_data), eval_sets, strict=True)
        )
    splits = [split_held_out(part, config.held_out, config.seed) for part in sets]
    names = ["held_out"] if len(sets) == 1 else [task.name for task in config.tasks]
    held_out = {name: part for name, (_, part) in zip(names, splits, strict=True) if part}
    return [sample for part, _ in splits for sample in part], held_out


class RowBudget:
    """Tokens of a packed row: as given, or halved whenever memory runs out."""

    def __init__(self, tokens: int, *, may_shrink: bool):
        self.tokens, self.may_shrink = tokens, may_shrink

    def attempt(self, work: Callable[[int], Result]) -> Result:
        """work(tokens), done anew with half of them as often as it runs out of memory; it must start from nothing."""
        while True:
            try:
                return work(self.tokens)
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
            # Out of the `except`: until here the error holds the frames that hold the memory.
            if not self.may_shrink or self.tokens < 2 * MIN_ROW_TOKENS:
                raise ValueError(
                    f"out of memory in a row of {self.tokens} tokens ({reason}): lower --row_tokens, --max_pixels or "
                    "--max_completion_tokens, or add --gradient_checkpointing"
                )
            self.tokens //= 2
            tqdm.write(f"out of memory: the pass is repeated with --row_tokens {self.tokens}, from here on ({reason})")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def row_budget(config: RunConfig, model: nn.Module, world: World, *, reference: bool, known: int = 0) -> RowBudget:
    """--row_tokens; for auto what the estimate leaves room for, the same on every rank.

    One process then halves it where the estimate was too high. Several cannot: the one that runs out has left the
    others waiting in a collective, so the run ends with the error, and they start at half of the estimate. `known` is
    what a run came to that is resumed.
    """
    if config.row_tokens != "auto":
        return RowBudget(int(config.row_tokens), may_shrink=False)
    memory = memory_estimate(model, world, config, reference=reference, row_tokens=1)
    per_token = memory.pop(ACTIVATIONS)
    room = 0.9 * device_memory_gb(world.device) - sum(memory.values())
    tokens = int(room / per_token / (1 if world.size == 1 else 2))
    tokens = -int(all_sum({"tokens": -float(tokens)}, world, largest=True)["tokens"])  # the least of all ranks
    tokens = min(max(tokens, MIN_ROW_TOKENS), known or MAX_ROW_TOKENS)
    return RowBudget(tokens, may_shrink=world.size == 1)


def micro_batches(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Tensor]],  # of each prompt
    row_tokens: int,
    world: World,
    blank: Prompt,
) -> list[tuple[list[Prompt], list[list[Tensor]], list[tuple[int, int]]]]:
    """Packed rows as (prompts, completions, (prompt, completion) of each), as many on every rank, each with an image.

    Each block of a sharded model is gathered from all ranks when it runs. A rank that ran fewer rows, or left out the
    vision tower for want of an image, would leave the others waiting. A blank prompt, which nothing attends to, mends
    both for some 20 tokens.
    """
    lengths = [[len(ids) for ids in group] for group in completions]
    plan = plan_rows([prompt["input_ids"].shape[1] for prompt in prompts], lengths, row_tokens)
    plan += [[]] * (int(all_sum({"rows": len(plan)}, world, largest=True)["rows"]) - len(plan))
    rows = []
    for pieces in plan:
        chosen_prompts = [prompts[number] for number, _ in pieces]
        chosen = [[completions[number][index] for index in indices] for number, indices in pieces]
        # With a frozen tower images were seen while drawing, and no row runs it.
        needs_image = "pixel_values" in blank and not any("pixel_values" in prompt for prompt in chosen_prompts)
        if world.size > 1 and (needs_image or not pieces):
            chosen_prompts, chosen = [*chosen_prompts, blank], [*chosen, []]
        rows.append((chosen_prompts, chosen, [(number, index) for number, indices in pieces for index in indices]))
    return rows


# ---- checkpoints ---------------------------------------------------------------------------------------------------


class CheckpointKeeper:
    """Writes OUT/checkpoints/step-NNNNNN, keeps the newest few and the best, and points OUT/best at that one."""

    def __init__(
        self,
        out: Path,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        config: RunConfig,
        world: World,
        *,
        num_samples: int = 0,
    ):
        self.directory, self.link = out / "checkpoints", out / "best"
        self.model, self.optimizers, self.config, self.world = model, optimizers, config, world
        self.best: float | None = None  # the headline figure of the best model so far, the untrained one included
        self.best_step: int | None = None  # of the checkpoint that OUT/best points at
        self.num_failed = 0  # saves in a row that could not be written
        self.row_tokens = 0  # what auto came to, where the run resumed knew
        # What must be the same when the run is resumed, though the paths to it may have changed.
        self.origin = {"num_samples": num_samples, "model": model_fingerprint(config.model)}

    def save(self, step: int, *, row_tokens: int = 0, best: float | None = None) -> bool:
        """Saves after that step; `best` is the score that makes it the best so far. False where that failed."""
        marks = (self.best, self.best_step) if best is None else (best, step)
        state = {"step": step, "best": marks[0], "best_step": marks[1], "processes": self.world.size}
        try:
            if self.world.first:
                for log in self.directory.parent.glob("*.jsonl"):  # no power cut takes lines of what is saved
                    sync_file(log)
            save_checkpoint(
                self.directory / f"step-{step:06d}",
                self.model,
                self.optimizers,
                state | {"row_tokens": row_tokens} | self.origin,
                self.world,
                source=self.config.model,
                dtype=compute_dtype(self.config.dtype),
                pixels=(self.config.min_pixels, self.config.max_pixels),
            )
        except SaveFailed as error:
            self._warn(step, error)
            return False
        (self.best, self.best_step), self.num_failed = marks, 0
        if self.world.first:
            self._point_at_the_best()
            for old in sorted(self.directory.glob("step-*"))[: -self.config.keep_checkpoints]:
                if old.name != f"step-{self.best_step or 0:06d}":
                    remove_directory(old)
        return True

    def _warn(self, step: int, error: SaveFailed) -> None:
        self.num_failed += 1
        if self.world.first:
            tqdm.write(
                f"warning: step {step} could not be saved: {error}; {self.num_failed} save(s) in a row have failed. "
                f"The run goes on; {self.newest()} is what it could be resumed from. Make room in {self.directory}"
            )

    def newest(self) -> str:
        """The checkpoint that a resume would take, in words."""
        found = sorted(self.directory.glob("step-*"))
        return str(found[-1]) if found else "no checkpoint"

    def _point_at_the_best(self) -> None:
        path = self.directory / f"step-{self.best_step or 0:06d}"
        if self.best_step is not None and path.exists() and self.link.resolve() != path.resolve():
            fresh = self.link.with_name(".best")
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(path.relative_to(self.link.parent))
            fresh.rename(self.link)

    def after_step(self, step: int, score: float | None, *, last: bool, row_tokens: int = 0) -> None:
        """Saves if the evaluation just made is the best so far, if a checkpoint is due, or if the run ends here."""
        saved = True
        if score is not None and (self.best is None or score > self.best):
            saved = self.save(step, row_tokens=row_tokens, best=score)
        elif last or step % self.config.save_every == 0:
            saved = self.save(step, row_tokens=row_tokens)
        if last and not saved:
            raise ValueError(
                f"the run ends at step {step} and could not be saved, see the warning above: make room, then go on "
                f"from {self.newest()} with --resume {self.directory.parent}"
            )

    def resume(self) -> int:
        """Restores the newest checkpoint; returns the steps it has behind it, 0 where the run died before its first."""
        found = sorted(self.directory.glob("step-*"))
        if not found:
            if self.world.first:
                tqdm.write(f"{self.directory} holds no checkpoint yet: the run begins anew")
            return 0
        state = load_training_state(found[-1], self.model, self.optimizers, self.world)
        for name, value in self.origin.items():
            if state[name] != value:
                raise ValueError(
                    f"{name} was {state[name]!r} in {found[-1]} and is {value!r} now: the data order, the reference "
                    "and what is frozen would be others; give the --data and the --model that the run began with"
                )
        self.best, self.best_step = state["best"], state["best_step"]
        self.row_tokens = state["row_tokens"] if state["processes"] == self.world.size else 0
        if self.world.first:
            self._point_at_the_best()  # the run may have died between the checkpoint and its link
        return state["step"]


def model_fingerprint(name: str) -> str:
    """Sixteen hex digits that change with the weights files of a model: their names, sizes and a sample of bytes."""
    config = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False)
    digest = hashlib.sha256()
    for path in sorted(Path(config).parent.glob("*.safetensors")) if config else []:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for part in range(64):  # 256 KB of a file, however large
                file.seek(size * part // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


# ---- what a run tells ----------------------------------------------------------------------------------------------


class RunLog:
    """One flat dict per step: a line of metrics.jsonl, tensorboard and wandb where asked for; rank 0 alone writes."""

    def __init__(self, out: Path, config: RunConfig, world: World, start_step: int):
        self.out, self.first, self.boards = out, world.first, []
        self.waiting: dict[Path, list[dict]] = {}  # rows that a full disk did not take
        if self.first:
            self.say(f"writing to {out}")
            # Only now: a resume that was refused leaves the options of the run as they were.
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            about = {"options": asdict(config), "files": config.known_files, "versions": versions}
            write_text_safely(out / "config.json", json.dumps(about, indent=1))
            for name in LOGS:
                _drop_after(out / name, start_step)  # a resumed run repeats what came after its checkpoint
            newer, older = out / "completions.jsonl", out / "completions.1.jsonl"
            if older.exists() and not newer.stat().st_size:  # the file was changed after the checkpoint
                older.replace(newer)
            self._open_boards(config, start_step)
        barrier(world)  # other ranks read some of these

    def _open_boards(self, config: RunConfig, start_step: int) -> None:
        out = self.out
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step is the first that is repeated, and an evaluation comes before the first step
            board = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1 if start_step else 0)
            self.boards.append(lambda step, figures: [board.add_scalar(k, v, step) for k, v in figures.items()])
        if config.wandb:
            import wandb

            wandb_run = wandb.init(project="nano-vlm-r1", name=out.name, config=asdict(config), dir=str(out))
            self.boards.append(lambda step, figures: wandb_run.log(figures, step=step))

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self.first:
            tqdm.write(text)

    def metrics(self, step: int, figures: dict[str, float]) -> None:
        """Prints a step's figures on a line and appends them to metrics.jsonl."""
        self.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        self.write("metrics.jsonl", step, figures)

    def write(self, name: str, step: int, figures: dict) -> None:
        """Appends {"step": ..., **figures} to a file of the run."""
        if not self.first:
            return
        path = self.out / name
        if name == "completions.jsonl" and path.exists() and path.stat().st_size > MAX_COMPLETIONS_BYTES:
            path.replace(self.out / "completions.1.jsonl")
        rows = [*self.waiting.pop(path, []), {"step": step, **figures}]
        if not append_rows(path, rows):
            self.waiting[path] = rows
        numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        for board in self.boards:
            board(step, numbers)


def append_rows(path: Path, rows: Sequence[dict]) -> bool:
    """Appends a JSON line for each row; a full disk leaves the file as it was, with a warning and False."""
    data = "".join(json.dumps(_strict(row)) + "\n" for row in rows).encode()
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)  # in one write: several ranks may append
    try:
        written = os.write(number, data)
        if written < len(data):
            os.ftruncate(number, os.fstat(number).st_size - written)
        reason = "" if written == len(data) else "no space left"
    except OSError as error:
        reason = str(error)
    finally:
        os.close(number)
    if reason:
        tqdm.write(f"warning: {len(rows)} line(s) wait to be written to {path}: {reason}")
    return not reason


def _strict(value: object) -> object:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON lines file of the run; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _drop_after(path: Path, step: int) -> None:
    """Keeps the lines up to that step; one that a killed process left without its end is dropped."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        kept = [line + "\n" for line in lines if step and json.loads(line)["step"] <= step]
        fresh = path.with_suffix(".partial")
        fresh.write_text("".join(kept), encoding="utf-8")
        fresh.rename(path)


class BadSteps:
    """Writes steps without a finite update to bad_steps.jsonl, and ends the run after too many in a row."""

    def __init__(self, out: Path, config: RunConfig, world: World, start: int):
        self.path, self.limit, self.world = out / "bad_steps.jsonl", config.max_bad_steps, world
        steps = {row["step"] for row in read_rows(self.path)}
        self.in_a_row = next(count for count in itertools.count() if start - count not in steps)

    def after_step(self, step: int, figures: dict[str, float], samples: list[dict], newest: str) -> None:
        """`samples` are this rank's suspects, `newest` the checkpoint to go back to."""
        if not figures["skipped_updates"]:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        row = {"step": step, **{name: figures[name] for name in ("loss", "grad_norm", "skipped_updates")}}
        samples = all_gather(samples, self.world)
        if self.world.first:
            tqdm.write(f"warning: step {step} had a loss or gradient that is not finite: update skipped, {self.path}")
            append_rows(self.path, [{**row, "samples": samples}])
        if self.in_a_row >= self.limit:
            raise ValueError(
                f"{self.in_a_row} steps in a row, the last of them {step}, without a finite loss and gradient: their "
                f"samples are in {self.path}. The weights are those before them, the last good checkpoint {newest}: "
                "look at the samples, lower --learning_rate, or allow more with --max_bad_steps"
            )


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
    """Set by Ctrl-C, SIGTERM or a time limit, so that the step in progress ends and is saved; a second Ctrl-C stops at
    once.

    Schedulers send SIGTERM to every process of a job, and `launch` passes it on: a second one means no more than one.
    """

    def __init__(self, max_hours: float = 0.0, began: float = 0.0):
        self.received = 0.0  # when
        self.deadline = began + 3600 * max_hours if max_hours else math.inf
        self.before, self.longest = time.monotonic(), 0.0  # the end of the step before, the longest step so far
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        # A terminal and a launcher may both pass one Ctrl-C on.
        if self.received and number == signal.SIGINT and time.monotonic() - self.received > ONE_KEYSTROKE:
            raise KeyboardInterrupt
        self.received = self.received or time.monotonic()

    def agreed(self, world: World) -> bool:
        """Whether any rank was told to stop or would end its next step too late; asked once a step, all hear the same.

        Between two questions lie a step and, now and then, an evaluation and a save: the longest so far is reserved.
        """
        now = time.monotonic()
        self.longest, self.before = max(self.longest, now - self.before), now
        stop = self.received > 0 or now + self.longest > self.deadline
        return all_sum({"stop": float(stop)}, world, largest=True)["stop"] > 0


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far: the GPU's, or this process's where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux


def draws_sharded(config: RunConfig, model: nn.Module, world: World) -> bool:
    """Whether layers stay sharded while drawing: because asked for, or because a whole copy would not fit."""
    if world.size == 1:
        return False
    terms = memory_estimate(model, world, config, reference=False, row_tokens=0)
    return config.draw_sharded or sum(terms.values()) > 0.9 * device_memory_gb(world.device)


def device_memory_gb(device: torch.device) -> float:
    """Memory of the GPU, or of the machine where there is none."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def memory_estimate(
    model: nn.Module, world: World, config: RunConfig, *, reference: bool, row_tokens: int
) -> dict[str, float]:
    """GB per GPU of what a step holds, by arithmetic; activations are the roughest of the terms."""
    text = model.config.get_text_config()
    total, held = sum(p.numel() for p in model.parameters()), sum(p.numel() * p.itemsize for p in model.parameters())
    trained = sum(p.numel() for _, p in trainable(model))
    shards = 1 if world.mesh is None else world.mesh["shard"].size()
    width = compute_dtype(config.dtype).itemsize
    layer_width = (
        2 * text.hidden_size if config.gradient_checkpointing else 14 * text.hidden_size + 4 * text.intermediate_size
    )
    layers = sum(p.numel() for p in model.get_submodule(DECODER_LAYERS).parameters())
    gathered = trained if shards == 1 else total - layers if world.draw_sharded else total
    terms = {
        "weights, gradients, moments": (held + 12 * trained) / shards,
        "gathered while drawing": width * gathered if world.mesh is not None else 0,
        "reference": width * total / shards if reference else 0,
        ACTIVATIONS: row_tokens * text.num_hidden_layers * layer_width * width,
        "logits of a chunk": 3 * 4 * CHUNK_LOGITS[world.device.type],
    }
    return {name: size / 1e9 for name, size in terms.items()}


def describe_files(samples: Sequence[Sample], config: RunConfig, steps: int) -> list[str]:
    """A line per data file: how much it gives, and what is asked of it."""
    sizes = Counter(sample.file for sample in samples)
    shares = config.file_shares or [sizes[number] for number in range(len(config.tasks))]
    lines = []
    for number, task in enumerate(config.tasks):
        share = shares[number] / sum(shares)
        passes = steps * config.prompts_per_step * share / sizes[number]
        lines.append(
            f"  {task.name}: {sizes[number]:,} samples, {share:.1%} of each step, {passes:,.2f} passes; "
            f"template {task.template}, rewards {' '.join(task.rewards)}"
        )
    return lines


def describe_run(
    model: nn.Module,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    config: RunConfig,
    world: World,
    steps: int,
    *,
    completions: int,
    reference: bool,
) -> str:
    """What `--dry_run` prints: sizes, lengths of 64 prompts spread over the data, an estimate of memory."""
    chosen = samples[:: max(1, len(samples) // 64)]
    tasks = config.tasks
    prompts = [
        build_prompt(processor, sample, template=tasks[sample.file].template, box_space=config.box_space)
        for sample in chosen
    ]
    lengths = sorted(prompt["input_ids"].shape[1] for prompt in prompts)
    row_tokens = row_budget(config, model, world, reference=reference).tokens
    memory = memory_estimate(model, world, config, reference=reference, row_tokens=row_tokens)
    per_step = config.prompts_per_step
    trained, total = sum(p.numel() for _, p in trainable(model)), sum(p.numel() for p in model.parameters())
    lines = [
        f"{len(samples):,} samples; {per_step} prompts and {per_step * completions} completions a step; "
        f"{len(samples) / per_step:,.1f} steps an epoch; {steps:,} steps",
        *(describe_files(samples, config, steps) if len(tasks) > 1 else []),
        f"prompt tokens, images included, of {len(lengths)} samples: median {lengths[len(lengths) // 2]:,}, "
        f"longest {lengths[-1]:,}",
        f"{trained:,} of {total:,} parameters trained, {world.size} process(es)",
        f"estimated memory per process with rows of {row_tokens:,} tokens: {sum(memory.values()):.2f} GB",
        *(f"{size:10.2f} GB  {name}" for name, size in memory.items()),
    ]
    return "\n".join(lines)
