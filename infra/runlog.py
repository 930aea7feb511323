"""What a run writes besides checkpoints: its options, a line per step, evaluations and completions.

The process can be killed at any moment: a file is either whole or as it was, and a resumed run drops the lines that
came after its checkpoint.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers

from data import BadSample
from infra.checkpoint import write_text_safely
from infra.config import RunConfig
from infra.parallel import World, all_gather, barrier
from infra.pictures import draw_group
from infra.report_data import read_evaluations
from infra.terminal import Terminal, say

MAX_COMPLETIONS_BYTES = 64_000_000  # a longer completions.jsonl becomes completions.1.jsonl and starts again
LOGS = (
    "metrics.jsonl", "completions.jsonl", "completions.1.jsonl", "eval.jsonl", "answers.jsonl", "bad_samples.jsonl",
    "bad_steps.jsonl"
)  # fmt: skip


def open_run(config: RunConfig, world: World) -> Path:
    """Makes the output directory and returns it; refuses one that holds a run or cannot be written."""
    name = config.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(all_gather([name], world)[0])  # the clocks of the ranks may differ
    if not config.resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} holds a run: give another --output_dir, or --resume {out} to continue it")
    reason = ""
    if world.first:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / ".writable").touch()
            (out / ".writable").unlink()
        except OSError as error:
            reason = error.strerror
    if reason := all_gather([reason], world)[0]:
        raise ValueError(f"output_dir {out} cannot be written ({reason}): give another --output_dir")
    return out


class RunLog:
    """The files of a run, and tensorboard and wandb if asked for. Only rank 0 writes."""

    def __init__(self, out: Path, config: RunConfig, world: World, start_step: int, num_steps: int):
        self.out, self.first, self.log_images = out, world.first, getattr(config, "log_images", False)
        self.terminal = Terminal(config, first=self.first)
        self.tensorboard = self.wandb = None
        self.waiting: dict[Path, list[dict]] = {}  # rows that a full disk did not take
        if self.first:
            # Written only now: a resume that is refused leaves the options of the run alone.
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            about = {"options": asdict(config), "files": list(map(asdict, config.files)), "versions": versions}
            about["num_steps"] = num_steps
            write_text_safely(out / "config.json", json.dumps(about, indent=1))
            for name in LOGS:
                _drop_after(out / name, start_step)  # a resumed run repeats what came after its checkpoint
            newer, older = out / "completions.jsonl", out / "completions.1.jsonl"
            if older.exists() and not newer.stat().st_size:  # the file was replaced after the checkpoint
                older.replace(newer)
            self.terminal.restore(read_evaluations(out))
            self._open_boards(config, start_step)
        barrier(world)  # other ranks read some of these files

    def _open_boards(self, config: RunConfig, start_step: int) -> None:
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step is the first step that is repeated; an evaluation precedes the first step
            purge_step = start_step + 1 if start_step else 0
            self.tensorboard = SummaryWriter(str(self.out / "tensorboard"), purge_step=purge_step)
        if config.wandb:
            import wandb

            self.wandb = wandb.init(project="nano-vlm-r1", name=self.out.name, config=asdict(config), dir=str(self.out))

    def say(self, text: str, *, whole: bool = False) -> None:
        """Prints a text above the progress bar."""
        if self.first:
            say(text, whole=whole)

    def show(self, step: int, title: str, text: str) -> None:
        """Prints a text, and sends it to tensorboard if that is on."""
        self.say(f"---- {title}\n{text}\n----", whole=True)
        if self.tensorboard:
            self.tensorboard.add_text(title, text, step)

    def metrics(self, step: int, figures: dict[str, float]) -> None:
        """Appends a step's figures to metrics.jsonl and shows the first ones."""
        self.write("metrics.jsonl", step, figures)
        self.terminal.end_step(step, figures)

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
        if self.tensorboard:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)
        if name == "completions.jsonl" and self.log_images:
            self._send_picture(step, figures)

    def _send_picture(self, step: int, group: dict) -> None:
        """Sends a group of completions to the boards as an image."""
        try:
            picture = draw_group(group)
        except BadSample as error:
            self.say(f"warning: step {step}: no picture of the group: {error}")
            return
        if self.tensorboard:
            self.tensorboard.add_image("group", np.asarray(picture), step, dataformats="HWC")
        if self.wandb:
            import wandb

            self.wandb.log({"group": wandb.Image(picture, caption=group["question"])}, step=step)


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
        say(f"warning: {len(rows)} line(s) wait to be written to {path}: {reason}")
    return not reason


def _strict(value: object) -> object:
    """The same value with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON lines file of the run; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _drop_after(path: Path, step: int) -> None:
    """Keeps the lines up to that step, and drops a line that a killed process left unfinished."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        kept = [line + "\n" for line in lines if step and json.loads(line)["step"] <= step]
        fresh = path.with_suffix(".partial")
        fresh.write_text("".join(kept), encoding="utf-8")
        fresh.rename(path)
