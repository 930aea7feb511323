"""Runs that are killed, told to stop, out of disk or fed bad numbers: what is left goes on as if nothing had been."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

import parallel
import train
from options import parse_options
from run import LOGS, read_rows
from test_train import only_numbers, options

HERE = Path(__file__).parent
LENGTH_REWARD = """
import random

def length(completion, answer):
    return len(completion) % 5 / 4 + random.random() / 100  # random too, as a reward may be
"""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "sft"])  # so that a killed run costs no imports


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A reward that an untrained model earns now and then: without one nothing would move."""
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text(LENGTH_REWARD)
    return ["--rewards", f"{path}:length"]


def go(config, rank=0, processes=1, port=0):
    """What `python train.py` does with these options, as one of that many processes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if processes == 1:
        train.main(config)
    else:
        parallel._worker(rank, processes, port, train.main, (config,))


class Run:
    """A run in processes of its own, begun anew or resumed."""

    def __init__(self, argv, out, processes=1):
        out.mkdir(parents=True, exist_ok=True)
        argv = ["--resume", str(out)] if (out / "config.json").exists() else [*argv, "--output_dir", str(out)]
        config, port = parse_options(train.Config, argv, {}), parallel.free_port()
        self.processes = [SERVER.Process(target=go, args=(config, n, processes, port)) for n in range(processes)]
        for process in self.processes:
            process.start()

    def wait(self):
        for process in self.processes:
            process.join(120)
            assert process.exitcode == 0

    def kill_when(self, moment):
        """Kills all processes as soon as moment() holds; returns whether it came to that before the end."""
        while not moment():
            if not self.processes[0].is_alive():
                return False
            time.sleep(0.0005)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        return True


def lines(out):
    return sum(path.read_bytes().count(b"\n") for path in out.glob("metrics.jsonl"))


def saving(out):
    """The directories that saves are writing, or died writing: a new one is another number."""
    try:
        return {path.stat().st_ino for path in out.glob("checkpoints/.step-*.partial")}
    except FileNotFoundError:  # renamed meanwhile
        return set()


def after(out, seconds):
    """A moment that long after the next step's line."""
    begun, seen = lines(out), []

    def moment():
        if not seen and lines(out) != begun:
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= seconds

    return moment


def within_a_save(out, seconds):
    """A moment that long after the next save began."""
    left, seen = saving(out), []

    def moment():
        if not seen and saving(out) - left:
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= seconds

    return moment


def outcome(out, step):
    """All that two equal runs have in common: figures, completions, evaluations, weights and training state."""
    directory = out / "checkpoints" / f"step-{step:06d}"
    rows = {name: read_rows(out / name) for name in LOGS}
    rows["metrics.jsonl"] = only_numbers(rows["metrics.jsonl"])
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "README.md"}
    return rows, files, (out / "best").resolve().name if (out / "best").exists() else None


def assert_equal(found, expected):
    for name, rows in expected[0].items():
        assert found[0][name] == rows, name
    assert found[1].keys() == expected[1].keys()
    for name, content in expected[1].items():
        assert found[1][name] == content, name
    assert found[2] == expected[2]


VARIANTS = {  # options, processes, kills
    # 24 samples: epochs end within steps
    "passes and epochs": (["--num_iterations", "2", "--prompts_per_step", "5"], 1, 10),
    "lora": (["--lora_rank", "4", "--lora_dropout", "0.2", "--optimizer", "muon"], 1, 4),
    "two processes": (["--num_iterations", "2"], 2, 3),
}


def argv_of(checkpoint, scenes, *more):
    """Options of a small run that evaluates and saves, without its directory."""
    argv = options(checkpoint, scenes, "", *more)
    place = argv.index("--output_dir")
    return argv[:place] + argv[place + 2 :]


def survive(argv, out, kills, processes):
    """Runs to the end through that many kills, every third within a save; returns how many were within one."""
    rng, within = random.Random(1), 0
    for kill in range(kills):
        left, job = saving(out), Run(argv, out, processes)
        wanted = within_a_save(out, rng.uniform(0, 0.05)) if kill % 3 == 1 else after(out, rng.uniform(0, 0.4))
        if not job.kill_when(wanted):
            break
        within += bool(saving(out) - left)
    Run(argv, out, processes).wait()
    return within


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_at_random_moments_is_bit_for_bit_the_run_that_was_not(
    checkpoint, scenes, tmp_path, reward, variant
):
    more, processes, kills = VARIANTS[variant]
    argv = argv_of(checkpoint, scenes, *reward, *more, "--steps", "8", "--eval_every", "3", "--save_every", "2")
    Run(argv, tmp_path / "whole", processes).wait()
    within = survive(argv, tmp_path / "cut", kills, processes)
    assert within >= (3 if kills == 10 else 0)
    expected = outcome(tmp_path / "whole", 8)
    assert max(row["grad_norm"] for row in expected[0]["metrics.jsonl"]) > 0
    assert_equal(outcome(tmp_path / "cut", 8), expected)
