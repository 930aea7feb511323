"""Runs commands side by side, each on one core, and reuses what an earlier call has done.

A run is a directory named after a hash of its commands, so findings that have a run in common share it. A run that was
cut off begins again: it takes a minute or two.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from infra.terminal import clock

ROOT = Path(__file__).resolve().parents[2]
DONE = "done.json"


@dataclass(frozen=True)
class Job:
    """Commands that run after each other in one directory; each is what stands after `python`.

    {out} stands for the run's own directory, {data} for that of the data.
    """

    commands: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the directory: the same for the same commands."""
        text = json.dumps(self.commands)
        command = Path(shlex.split(self.commands[0])[0]).stem.strip("-")
        return f"{command}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def line(self, home: Path) -> str:
        """The line for a shell that runs the job under this home."""
        places = {"{out}": home / self.name, "{data}": home / "data"}
        words = []
        for command in self.commands:
            for mark, path in places.items():
                command = command.replace(mark, shlex.quote(str(path)))
            words.append(f"{shlex.quote(sys.executable)} {command}")
        return " && ".join(words)


def is_done(job: Job, home: Path) -> bool:
    """Whether this very run is complete: its mark holds the same command line."""
    mark = home / job.name / DONE
    return mark.exists() and json.loads(mark.read_text(encoding="utf-8"))["line"] == job.line(home)


def run_jobs(jobs: Iterable[Job], home: Path, num_parallel: int, say: Callable[[str], None] = print) -> None:
    """Runs the jobs that are not done; if one fails or Ctrl-C comes, all end."""
    wanted = list(dict.fromkeys(jobs))
    waiting = [job for job in wanted if not is_done(job, home)]
    if len(wanted) > len(waiting):
        say(f"{len(wanted) - len(waiting)} of {len(wanted)} runs are done already")
    if waiting:
        say(f"{len(waiting)} runs to do, {num_parallel} at a time, in {home}")
    live = _Live(home, total=len(waiting))
    try:
        while waiting or live.running:
            while waiting and len(live.running) < num_parallel:
                live.begin(waiting.pop(0))
            for job in live.collect():
                left = live.time_left(len(waiting), num_parallel)
                say(f"{live.total - len(waiting) - len(live.running)}/{live.total} runs  {left}  {job.name}")
            time.sleep(0.2)
    finally:
        live.end()


@dataclass
class _Live:
    """The processes that run now."""

    home: Path
    total: int
    running: dict[Job, tuple[subprocess.Popen, float]] = field(default_factory=dict)  # and when each began
    seconds: list[float] = field(default_factory=list)  # of each run that is done

    def begin(self, job: Job) -> None:
        out = self.home / job.name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        # Threads of two processes on the same core wait for each other.
        alone = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (out / "log.txt").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                ["sh", "-c", job.line(self.home)],
                cwd=ROOT,
                env=alone,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that the shell and what it runs end together
            )
        self.running[job] = process, time.monotonic()

    def collect(self) -> list[Job]:
        """The jobs that have ended well since the last call; ValueError for one that failed."""
        ended = [job for job, (process, _) in self.running.items() if process.poll() is not None]
        for job in ended:
            process, began = self.running.pop(job)
            out = self.home / job.name
            if process.returncode:
                log = out / "log.txt"
                tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
                raise ValueError(
                    f"a run failed with code {process.returncode}: {job.line(self.home)}\n{tail}\nsee {log}"
                )
            self.seconds.append(time.monotonic() - began)
            (out / "best").unlink(missing_ok=True)
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
            mark = {"line": job.line(self.home), "seconds": self.seconds[-1]}
            (out / DONE).write_text(json.dumps(mark), encoding="utf-8")
        return ended

    def time_left(self, num_waiting: int, num_parallel: int) -> str:
        """The time left by the mean of the runs that are done, as if those that run were half done."""
        seconds = sum(self.seconds) / len(self.seconds) * (num_waiting + len(self.running) / 2) / num_parallel
        return f"{clock(seconds)} left"

    def end(self) -> None:
        """Kills what still runs, the shells with their children; such a run begins again, so it need not save."""
        for process, _ in self.running.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
