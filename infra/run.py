"""One object that holds what a training run is; train.py and sft.py spell out a step each and leave the rest to it."""

import hashlib
import itertools
import math
import os
import shlex
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from data import Sample
from infra.budget import RowBudget, out_of_memory, row_budget
from infra.checkpoint import Packaging
from infra.config import RunConfig
from infra.estimate import must_draw_sharded
from infra.evaluation import Protocol, answer_samples, handle_reward_errors
from infra.keeper import CheckpointKeeper, model_fingerprint
from infra.optim import (
    apply_gradients,
    clip_gradients,
    learning_rate_factor,
    make_optimizers,
    seed_step,
    set_learning_rate,
)
from infra.parallel import STOPPED, World, all_gather, all_sum, compute_dtype, drawing, process_group
from infra.policy import FollowingReference, load_policy, load_reference
from infra.prompts import PromptFeed, RunSamples, load_run_samples
from infra.report import write_report
from infra.report_data import read_evaluations
from infra.rows import Row, pack_rows
from infra.runlog import RunLog, append_rows, open_run, read_rows
from infra.stop import StopSignal
from infra.terminal import header, hide_library_bars, in_terminal, say, score_table, short_path, time_line
from metrics.summary import headline, summarize
from model.graphs import GRAPHS
from model.vlm import Prompt, banned_token_ids, blank_prompt, check_special_tokens, eos_token_ids, trainable
from rollout import see_images, tower_is_frozen

MAX_ANSWERS = 200  # of each evaluation set that answers.jsonl keeps
RECENT = 25  # steps that warnings look back on


@dataclass
class Run:
    """A training run: the model and everything around it."""

    config: RunConfig
    world: World
    out: Path
    policy: nn.Module
    processor: ProcessorMixin
    reference: nn.Module | None  # the model that the KL penalty measures from, if that is a second model
    optimizers: list[torch.optim.Optimizer]
    feed: PromptFeed
    eval_sets: dict[str, list[Sample]]
    keeper: CheckpointKeeper
    log: RunLog
    stop: StopSignal
    num_steps: int
    step: int  # the step in progress, counted from 0; so also how many are done
    eos_ids: list[int]
    banned_ids: list[int]
    blank: Prompt  # a small image that a rank adds to a row when it has none
    following: FollowingReference | None = None  # the reference of --ref_every
    generator: torch.Generator | None = None  # draws the completions of the step in progress
    figures: dict[str, float] = field(default_factory=dict)  # what the step in progress has measured so far
    recent: deque = field(init=False)  # the figures of the last steps
    budget: RowBudget = field(init=False)  # the tokens of a packed row
    warned: set[str] = field(default_factory=set)  # causes that the user has been warned about
    stopped: bool = False

    def __post_init__(self) -> None:
        done = read_rows(self.out / "metrics.jsonl")  # of a run that is resumed
        self.recent = deque(done, maxlen=max(RECENT, self.config.max_bad_steps))
        self.budget = row_budget(self.policy, self.world, self.config, reference=self.reference is not None)

    # ---- the loop ----

    def steps(self) -> Iterator[int]:
        """The steps still to do, each seeded and with its learning rate set; ends early if the run is told to stop.

        A new run evaluates the untrained model first; at the end it prints where everything is.
        """
        config, start = self.config, self.step
        if start >= self.num_steps:
            self.log.say(f"{self.out} has done its {self.num_steps} steps: give more --steps to continue it")
            return
        self.log.terminal.begin(start, self.num_steps)
        if start == 0 and config.eval_every:
            self.keeper.best = self.evaluate()
        for step in range(start, self.num_steps):
            factor = learning_rate_factor(step, self.num_steps, config.warmup_steps, config.schedule)
            self.figures = {"learning_rate": set_learning_rate(self.optimizers, factor), "skipped_updates": 0.0}
            self.generator = seed_step(config.seed, step, self.world)
            yield step
            if self.stopped:
                break
        self._say_goodbye()

    def prompts(self) -> list[Prompt]:
        """The prompts of the step in progress, this rank's share."""
        return self.feed.take(self.step, last=self.step + 1 == self.num_steps)

    def pack(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]], chosen: Sequence[int]
    ) -> list[Row]:
        """The groups of the chosen prompts in packed rows, as many on every rank."""
        tokens = self.budget.choose()
        rows = pack_rows(prompts, completions, chosen, tokens, self.blank, self.world)
        self.figures["row_tokens"] = float(tokens)
        self.budget.begin(rows)
        return rows

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measures seconds_<name> of a block, the device's work included."""
        start = self._clock()
        yield
        self.figures[f"seconds_{name}"] = self._clock() - start

    def _clock(self) -> float:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def update(self, loss: float) -> float:
        """Takes an optimizer step, unless the loss or the gradient is not finite; returns the gradient's norm."""
        self.budget.end()
        norm = clip_gradients([parameter for _, parameter in trainable(self.policy)], self.config.max_grad_norm)
        whole_loss = all_sum({"loss": loss}, self.world)["loss"]
        finite = math.isfinite(norm) and math.isfinite(whole_loss)  # the same on every rank
        apply_gradients(self.optimizers, finite=finite)
        self.figures["skipped_updates"] += float(not finite)
        return norm

    def end_step(self, figures: dict[str, float], prompts: Sequence[Prompt], group: dict | None = None) -> None:
        """Logs the step, then evaluates and saves if due; `group` is a line for completions.jsonl."""
        self.figures = {**figures, **self.figures, "memory_gb": self.budget.peak_gb()}
        self.figures |= self.feed.figures()
        self.step += 1
        self.recent.append(self.figures)
        self.log.metrics(self.step, self.figures)
        if group:
            self.log.write("completions.jsonl", self.step, group)
        self._check_bad_steps(prompts)
        last = self.step == self.num_steps
        self.stopped = not last and self.stop.agreed(self.world)
        due = self.config.eval_every and (self.step % self.config.eval_every == 0 or last)
        score = self.evaluate() if due else None
        with self.log.terminal.aside_from_steps("save"):
            self.keeper.after_step(self.step, score, last=last or self.stopped)

    # ---- what a step may lead to ----

    def evaluate(self) -> float | None:
        """Evaluates the policy on each set and logs the figures; returns the headline figure of the first set."""
        score, answers, terminal = None, [], self.log.terminal
        with terminal.aside_from_steps("evaluate"):
            for name, samples in self.eval_sets.items():
                tell = partial(terminal.evaluating, name)
                protocol = self._protocol(samples)
                rows = answer_samples(self.policy, self.processor, samples, self.world, protocol, tell)
                handle_reward_errors(rows, getattr(self.config, "on_reward_error", "stop"), self.world)
                summary = summarize(rows)
                score = summary[headline(summary)] if score is None else score
                self.log.write("eval.jsonl", self.step, {f"eval/{name}/{key}": value for key, value in summary.items()})
                terminal.evaluated(self.step, name, summary)
                shown = rows[:: 1 + (len(rows) - 1) // MAX_ANSWERS]
                answers += [{"step": self.step, "set": name, "of": len(rows), **row} for row in shown]
            self.report(answers)
        return score

    def _protocol(self, samples: Sequence[Sample]) -> Protocol:
        """What an evaluation set is evaluated under."""
        config = self.config
        file = config.files[samples[0].file]
        return Protocol(
            template=file.template,
            measure=file.measure,
            max_completion_tokens=config.max_completion_tokens,
            batch_size=config.eval_batch_size,
            box_space=config.box_space,
            reward_seconds=getattr(config, "reward_seconds", 0.0),
            seed=config.seed,
        )

    def report(self, answers: Sequence[dict] = ()) -> None:
        """Writes the answers of an evaluation to answers.jsonl, in place of the last ones, and then the page."""
        if not self.world.first:
            return
        try:
            fresh = self.out / ".answers.jsonl.partial"
            fresh.unlink(missing_ok=True)
            if answers and append_rows(fresh, answers):
                fresh.rename(self.out / "answers.jsonl")
            if self.config.report:
                write_report([self.out])
        except Exception as error:  # a page is not worth a run: the disk may be full, an image may be gone
            self.log.say(f"warning: step {self.step}: report.html is not written: {type(error).__name__}: {error}")

    def warn_once(self, warnings: dict[str, str]) -> None:
        """Prints each warning whose cause is new; from the third step on, since one or two steps prove little."""
        for cause, text in warnings.items():
            if len(self.recent) >= 3 and cause not in self.warned:
                self.warned.add(cause)
                self.log.say(f"warning: step {self.step}: {text}")

    def _check_bad_steps(self, prompts: Sequence[Prompt]) -> None:
        """Writes a step without a finite update to bad_steps.jsonl, and stops the run after too many in a row."""
        if not self.figures["skipped_updates"]:
            return
        path = self.out / "bad_steps.jsonl"
        samples = all_gather([prompt.sample.id for prompt in prompts], self.world)
        row = {name: self.figures[name] for name in ("loss", "grad_norm", "skipped_updates")}
        if self.world.first:
            say(f"warning: step {self.step} has a loss or gradient that is not finite: no update, see {path}")
            append_rows(path, [{"step": self.step, **row, "samples": samples}])
        in_a_row = list(itertools.takewhile(lambda figures: figures["skipped_updates"], reversed(self.recent)))
        if len(in_a_row) >= self.config.max_bad_steps:
            raise ValueError(
                f"{len(in_a_row)} steps in a row, the last of them {self.step}, without a finite update: {path} "
                f"names their samples. The last good checkpoint is {self.keeper.newest()}. "
                "Look at the samples, lower --learning_rate, or allow more with --max_bad_steps"
            )

    def _say_goodbye(self) -> None:
        """Prints the evaluations, the time, where everything is, and what to do next; the page stands last."""
        log, out, best, score = self.log, self.out, self.keeper.best_step, self.keeper.best
        with log.terminal.aside_from_steps("report"):
            self.report()
        log.terminal.close()
        if table := score_table(read_evaluations(out)):
            log.say("\n".join(["", *table, ""]))
        log.say(f"time: {time_line(log.terminal)}")
        if best is not None:
            told = "no score yet on what is evaluated now" if score is None else f"score {score:.4f}"
            log.say(f"best: step {best}, {told}: {out / 'best'}")
        elif score is not None:
            log.say(f"no checkpoint beats the model that the run began with, which scores {score:.4f}")
        log.say(f"checkpoints: {self.keeper.directory}")
        model = out / "best" if best is not None else self.keeper.newest()
        log.say(f"to evaluate: {evaluate_command(self.config, model)}", whole=True)
        if self.stopped:
            told = f"stopped after step {self.step} of {self.num_steps}; to continue: {resume_command(out)}"
            log.say(told, whole=True)
        if self.config.report:
            log.say(f"a page to look at: {out / 'report.html'}", whole=True)

    @property
    def exit_code(self) -> int:
        """0 for a run that is done, STOPPED for one that was told to stop and saved."""
        return STOPPED if self.stopped else 0


def resume_command(out: Path) -> str:
    """The command line that continues the run, started as this process was."""
    script = os.path.basename(sys.argv[0])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        per_node, size = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
        nodes = f"--nnodes {size // per_node} " if size > per_node else ""
        more = "--rdzv_backend ... --rdzv_endpoint ... " if nodes else ""
        return f"torchrun {nodes}--nproc_per_node {per_node} {more}{script} --resume {shlex.quote(str(out))}"
    return f"python {script} --resume {shlex.quote(str(out))}"


def evaluate_command(config: RunConfig, model: str | Path) -> str:
    """The command line that evaluates a model on the evaluation files of the run."""
    words = ["python", "eval.py", "--model", str(model)]
    files = ["--mix", config.mix] if config.mix else ["--data", *(config.eval_data or ["FILE"])]
    words += map(short_path, files)
    words += ["--image_root", short_path(config.image_root)] if config.image_root else []
    words += ["--allow_outside_root"] if config.allow_outside_root else []
    return shlex.join(words)


def total_steps(config: RunConfig, num_samples: int) -> int:
    """--steps, or the steps that --epochs come to."""
    steps = config.steps or math.ceil(config.epochs * num_samples / config.prompts_per_step)
    if config.warmup_steps >= steps:
        raise ValueError(f"warmup_steps {config.warmup_steps} leaves no step of {steps} after the warm-up")
    return steps


def say_overrides(samples: Sequence[Sample], config: RunConfig) -> None:
    """Says how many samples name their own accuracy reward, which replaces the one that the options name."""
    methods = Counter(sample.reward for sample in samples if sample.reward)
    if methods:
        told = ", ".join(f"{method} ({count:,})" for method, count in methods.most_common())
        say(
            f"{methods.total():,} of {len(samples):,} samples name their own accuracy reward: {told}. It replaces "
            "the first reward of its file"
        )


def evaluation_settings(config: RunConfig) -> dict:
    """What the run evaluates under; eval.py reads it back from evaluation.json in a checkpoint."""
    names = ("template", "max_completion_tokens", "max_pixels", "min_pixels", "box_space", "eval_limit", "seed")
    files = {
        name: {"template": file.template, "measure": file.measure, "has_boxes": file.has_boxes}
        for name, file in config.evaluated.items()
    }
    return {name: getattr(config, name) for name in names} | {"files": files}


@contextmanager
def start_run(config: RunConfig) -> Iterator[Run]:
    """Checks the data, loads the model, restores a checkpoint if the run is resumed; yields the run."""
    began = time.monotonic()
    GRAPHS.usable = config.cuda_graphs == "auto"
    if not in_terminal():
        hide_library_bars()
    bf16 = compute_dtype(config.dtype) == torch.bfloat16
    with process_group(bf16=bf16, shard_within_node=config.shard_within_node) as world:
        run = build_run(config, world, began)
        hide_library_bars()  # a save would draw one
        try:
            yield run
        except torch.OutOfMemoryError as error:
            second, tokens = getattr(config, "needs_reference_model", False), run.budget.tokens
            told = out_of_memory(run.policy, run.world, config, reference=second, tokens=tokens)
            raise ValueError(told) from error
        finally:
            run.log.terminal.close()  # an error is told on a line of its own


def build_run(config: RunConfig, world: World, began: float) -> Run:
    """The run as it goes on from its newest checkpoint, or from the start; `began` is when its time began to count."""
    out, data = open_run(config, world), load_run_samples(config, world)
    num_steps = total_steps(config, len(data.training))
    policy, processor = load_policy(config, world)
    check_special_tokens(processor, [*data.training, *itertools.chain.from_iterable(data.eval_sets.values())])
    if world.first:
        say_overrides(data.training, config)
    second = getattr(config, "needs_reference_model", False)
    world = replace(world, draw_sharded=must_draw_sharded(config, policy, world, reference=second))
    reference, following = load_references(config, policy, world)
    optimizers, packaging = make_optimizers(policy, config), packaging_of(config, following)
    origin, evaluated = origin_of(config, data, world), describe_evaluation(data)
    keeper = CheckpointKeeper(out, policy, optimizers, config, world, packaging, origin, evaluated)
    step = keeper.resume() if config.resume else 0
    log = RunLog(out, config, world, step, num_steps)
    sizes = [sum(p.numel() for p in group) for group in (dict(trainable(policy)).values(), policy.parameters())]
    log.say("\n".join(header(config, out, len(data.training), sizes, num_steps)))
    return Run(
        config=config,
        world=world,
        out=out,
        policy=policy,
        processor=processor,
        reference=reference,
        following=following,
        optimizers=optimizers,
        feed=PromptFeed(data.training, processor, config, world, out / "bad_samples.jsonl", step),
        eval_sets=data.eval_sets,
        keeper=keeper,
        log=log,
        stop=StopSignal(config.max_hours, began, says=world.first),
        num_steps=num_steps,
        step=step,
        eos_ids=eos_token_ids(policy, processor),
        banned_ids=banned_token_ids(policy, processor),
        blank=blank_of(config, policy, processor, world),
    )


def load_references(
    config: RunConfig, policy: nn.Module, world: World
) -> tuple[nn.Module | None, FollowingReference | None]:
    """The reference that is a second model and the one that follows the policy: at most one of them is there."""
    if every := getattr(config, "ref_every", 0):
        return None, FollowingReference(policy, every, compute_dtype(config.dtype))
    return (load_reference(config, world) if getattr(config, "needs_reference_model", False) else None), None


def packaging_of(config: RunConfig, following: FollowingReference | None) -> Packaging:
    """What each checkpoint holds besides the policy and the optimizers."""
    pixels = (config.min_pixels, config.max_pixels)
    values = following.values if following else {}
    return Packaging(config.model, compute_dtype(config.dtype), pixels, evaluation_settings(config), values)


def origin_of(config: RunConfig, data: RunSamples, world: World) -> dict:
    """What must be the same when the run is resumed."""
    files = [[file.template, list(file.rewards), list(file.weights), file.share] for file in config.files]
    # Only the first rank is sure to hold the weights of a model from the hub: the others start empty.
    fingerprint = all_gather([model_fingerprint(config.model)], world)[0]
    return {"num_samples": len(data.training), "model": fingerprint, "files": files}


def describe_evaluation(data: RunSamples) -> str:
    """What the headline figure is measured on, in words that change with the samples and not with their place."""
    name, samples = next(iter(data.eval_sets.items()), ("nothing", []))
    digest = hashlib.sha256(repr([(sample.question, sample.answer) for sample in samples]).encode())
    return f"{len(samples)} samples of {name} ({digest.hexdigest()[:8]})"


def blank_of(config: RunConfig, policy: nn.Module, processor: ProcessorMixin, world: World) -> Prompt:
    """The small image for rows without one: with the same kind of inputs as the prompts that a step learns from."""
    blank = blank_prompt(processor)
    # Only train.py has a group_size; its draw puts image features in place of the prompts' pixels.
    if hasattr(config, "group_size") and tower_is_frozen(policy):
        with drawing(policy, world):
            blank = replace(blank, inputs=see_images(policy, blank))
    return blank
