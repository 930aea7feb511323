"""Which checkpoints a run keeps: the newest few and the best, a link to the best, and the way back to the newest."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers.utils import cached_file

from infra.checkpoint import (
    Packaging,
    SaveFailed,
    load_reference_values,
    load_training_state,
    remove_directory,
    save_checkpoint,
    sync_file,
)
from infra.config import RunConfig
from infra.parallel import World
from infra.terminal import say


@dataclass
class CheckpointKeeper:
    """Writes OUT/checkpoints/step-NNNNNN, keeps the newest few and the best, and points OUT/best at the best."""

    out: Path
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    config: RunConfig
    world: World
    packaging: Packaging
    origin: dict  # what must be the same when the run is resumed, though its paths may have changed
    best_on: str  # the evaluation samples that a score is measured on, in words
    best: float | None = None  # headline figure of the best model so far, the untrained one included
    best_step: int | None = None  # the checkpoint that OUT/best points at
    num_failed: int = field(default=0, init=False)  # failed saves in a row

    @property
    def directory(self) -> Path:
        return self.out / "checkpoints"

    def after_step(self, step: int, score: float | None, *, last: bool) -> None:
        """Saves if the evaluation just made is the best so far, if a checkpoint is due, or if the run ends here."""
        due = self.config.save_every and step % self.config.save_every == 0
        is_best = score is not None and (self.best is None or score > self.best)
        if not (is_best or due or last):
            return
        saved = self._save(step, best=score if is_best else None)
        if last and not saved:
            raise ValueError(
                f"the run ends at step {step} and could not be saved, see the warning above: make room, then continue "
                f"from {self.newest()} with --resume {self.out}"
            )

    def _save(self, step: int, *, best: float | None) -> bool:
        """Saves after that step; `best` is the score that makes it the best so far. Returns False if that failed."""
        marks = (self.best, self.best_step) if best is None else (best, step)
        state = {"step": step, "best": marks[0], "best_step": marks[1], "best_on": self.best_on, **self.origin}
        if self.world.first:
            with warned_of_disk_errors():  # a power cut must not take lines that precede the checkpoint
                for log in self.out.glob("*.jsonl"):
                    sync_file(log)
        try:
            path = self.directory / f"step-{step:06d}"
            save_checkpoint(path, self.model, self.optimizers, state, self.world, self.packaging)
        except SaveFailed as error:
            self._warn(step, error)
            return False
        (self.best, self.best_step), self.num_failed = marks, 0
        if self.world.first:
            with warned_of_disk_errors():
                self._link_best()
                for old in sorted(self.directory.glob("step-*"))[: -self.config.keep_checkpoints]:
                    if old.name != f"step-{self.best_step or 0:06d}":
                        remove_directory(old)
        return True

    def _warn(self, step: int, error: SaveFailed) -> None:
        self.num_failed += 1
        if self.world.first:
            say(
                f"warning: step {step} could not be saved: {error}. That is failure {self.num_failed} in a row. The "
                f"run goes on and tries again at the next save; a resume would start from {self.newest()}. Make room "
                f"in {self.directory}"
            )

    def newest(self) -> str:
        """The checkpoint that a resume would start from, in words."""
        found = sorted(self.directory.glob("step-*"))
        return str(found[-1]) if found else "no checkpoint"

    def _link_best(self) -> None:
        link, path = self.out / "best", self.directory / f"step-{self.best_step or 0:06d}"
        if self.best_step is not None and path.exists() and link.resolve() != path.resolve():
            fresh = link.with_name(".best")
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(path.relative_to(link.parent))
            fresh.rename(link)

    def resume(self) -> int:
        """Restores the newest checkpoint; returns its step, 0 if the run died before its first checkpoint."""
        found = sorted(self.directory.glob("step-*"))
        if not found:
            if self.world.first:
                say(f"{self.directory} holds no checkpoint yet: the run starts again")
            return 0
        state = load_training_state(found[-1], self.model, self.optimizers, self.world)
        for name, value in self.origin.items():
            if state[name] != value:
                raise ValueError(
                    f"{name} was {state[name]!r} in {found[-1]} and is {value!r} now: the data order, the reference "
                    "and what is frozen would differ; give the data and the --model that the run began with"
                )
        self.best, self.best_step = state["best"], state["best_step"]
        if (before := state.get("best_on", self.best_on)) != self.best_on:  # the scores say nothing about each other
            self.best = None
            if self.world.first:
                told = f"the score is now that of {self.best_on} and was that of {before}"
                say(f"{told}: the next one is the best so far")
        if self.packaging.reference:
            load_reference_values(found[-1], self.model, self.packaging.reference, self.world)
        if self.world.first:
            with warned_of_disk_errors():
                self._link_best()  # the run may have died between the checkpoint and its link
        return state["step"]


@contextmanager
def warned_of_disk_errors() -> Iterator[None]:
    """Turns a disk error of the block into a warning: what was left undone, the next save does."""
    try:
        yield
    except OSError as error:
        say(f"warning: {error}. The run goes on; the next save tries again")


def model_fingerprint(name: str) -> str:
    """Sixteen hex digits that change with the weights files of a model: their names, sizes and a sample of bytes."""
    config = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False)
    digest = hashlib.sha256()
    for path in sorted(Path(config).parent.glob("*.safetensors")) if config else []:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for part in range(64):  # 256 KB of a file, whatever its size
                file.seek(size * part // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]
