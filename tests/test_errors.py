"""A user's error is one line on stderr and exit code 2, however many processes there are and whoever starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import options

HERE = Path(__file__).parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
START = """
import sys
from infra import parallel
from infra.config import TrainConfig
from infra.options import config_from_command_line
import train
if __name__ == "__main__":
    config = config_from_command_line(TrainConfig, sys.argv[1:], {})
    parallel.spawn(2, parallel._run_and_report, train.main, config)
"""


def run_command(*words, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture
def spawned(tmp_path):
    """The command that starts two processes by itself, as on a machine with two GPUs."""
    (tmp_path / "start.py").write_text(START)
    return lambda *argv: run_command(tmp_path / "start.py", *argv, PYTHONPATH=HERE)


@pytest.fixture
def wrong(checkpoint, scenes, tmp_path):
    """The options of a run with a box that leaves its image, and the line that tells so."""
    record = json.loads((scenes / "train.jsonl").read_text().splitlines()[0])
    record["conversations"][1]["value"] = "[3, 4, 900, 20]"
    (tmp_path / "wrong.jsonl").write_text(json.dumps(record))
    told = f"error: {tmp_path}/wrong.jsonl:1: box [3, 4, 900, 20] leaves its image of 64 x 64 pixels; "
    more = ("--data", str(tmp_path / "wrong.jsonl"), "--image_root", str(scenes))
    return options(checkpoint, scenes, tmp_path / "out", *more), told


def test_a_command_ends_with_the_line_alone_or_with_the_traceback_if_that_is_asked_for(wrong):
    argv, told = wrong
    done = run_command("train.py", *argv)
    assert done.returncode == 2 and done.stderr.startswith(told) and done.stderr.count("\n") == 1, done.stderr
    done = run_command("train.py", *argv, "--traceback")
    assert done.returncode == 1 and "error: " not in done.stderr
    assert "Traceback" in done.stderr and "BadSample" in done.stderr.splitlines()[-1]


def test_two_processes_of_torchrun_print_the_line_once(wrong):
    argv, told = wrong
    done = run_command(*TORCHRUN, "train.py", *argv)
    assert done.returncode == 1 and done.stderr.count("error: ") == done.stderr.count(told) == 1, done.stderr
    assert "exitcode  : 2" in done.stderr  # torchrun's own table of failures
    ours = [path for path in HERE.glob("*.py")] + [HERE / "infra", HERE / "model"]
    assert not any(f'File "{path}' in done.stderr for path in ours)  # torchrun prints its own traceback, none of ours


def test_two_processes_that_the_command_starts_print_the_line_and_nothing_else(wrong, spawned):
    argv, told = wrong
    done = spawned(*argv)
    assert done.returncode == 2 and done.stderr.startswith(told) and done.stderr.count("\n") == 1, done.stderr


def test_too_few_prompts_for_the_processes_are_refused(checkpoint, scenes, tmp_path, spawned):
    done = spawned(*options(checkpoint, scenes, tmp_path / "out", "--prompts_per_step", "1"))
    told = "error: prompts_per_step 1 is below the 2 processes: each needs a prompt\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_a_name_that_is_neither_a_directory_nor_on_the_hub_is_told_in_one_line(scenes, tmp_path):
    done = run_command("train.py", *options("mdoel", scenes, tmp_path / "out"))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-300:]
    told = "error: model mdoel: no directory here, and the hub does not give it: "
    assert done.stderr.splitlines()[-1].startswith(told)
