"""What a run writes: its options, a line per step, completions, checkpoints kept, and what went wrong.

Everything can be killed at any moment: a file is whole or as it was, and a resumed run drops what came after its
checkpoint.
"""

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers.utils import cached_file

from infra.checkpoint import (
    SaveFailed,
    load_training_state,
    remove_directory,
    save_checkpoint,
    sync_file,
    write_text_safely,
)
from infra.options import RunConfig, compute_dtype
from infra.parallel import World, all_gather, barrier

MAX_COMPLETIONS_BYTES = 64_000_000  # then completions.jsonl becomes completions.1.jsonl, in place of the one before
LOGS = (
    "metrics.jsonl", "completions.jsonl", "completions.1.jsonl", "eval.jsonl", "bad_samples.jsonl", "bad_steps.jsonl"
)  # fmt: skip


def open_run(config: RunConfig, world: World) -> Path:
    """The output directory, made; refuses one that holds another run."""
    name = config.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(all_gather([name], world)[0])  # the clocks of the ranks may differ
    if not config.resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} holds a run: give another --output_dir, or --resume {out} to go on with it")
    if world.first:
        out.mkdir(parents=True, exist_ok=True)
    return out


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
