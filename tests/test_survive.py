"""Runs that are killed, told to stop, or fed bad numbers: a resumed run goes on as if nothing had happened."""

import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import argv_of, assert_equal, full_disk, only_numbers, options, outcome, run_here
from safetensors.torch import load_file

import sft
import toy.scenes
import train
from infra import parallel
from infra.config import SftConfig, TrainConfig
from infra.options import parse_options
from infra.runlog import read_rows

HERE = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "sft"])  # so that a killed run costs no imports


def go(main, config, rank=0, processes=1, port=0):
    """What `python train.py` does with these options, as one of that many processes."""
    said = os.open(f"{config.output_dir}.rank{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if processes == 1:
        parallel._run_and_report(main, config)
    else:
        parallel._worker(rank, processes, port, parallel._run_and_report, (main, config))


class Run:
    """A run in processes of its own, begun anew or resumed."""

    def __init__(self, argv, out, processes=1, *, main=train.main, more=()):
        out.mkdir(parents=True, exist_ok=True)
        argv = ["--resume", str(out)] if (out / "config.json").exists() else [*argv, "--output_dir", str(out)]
        config_class = SftConfig if main is sft.main else TrainConfig
        config, port = parse_options(config_class, [*argv, *more]), parallel.free_port()
        places = [(main, config, rank, processes, port) for rank in range(processes)]
        self.processes = [SERVER.Process(target=go, args=place) for place in places]
        for process in self.processes:
            process.start()

    def wait(self, code=0):
        for process in self.processes:
            process.join(120)
        assert [process.exitcode for process in self.processes] == [code] * len(self.processes)

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


def supervised(argv):
    """The options of a GRPO run as far as sft.py has them."""
    for name in ("--group_size", "--log_completions_every"):
        place = argv.index(name)
        argv = argv[:place] + argv[place + 2 :]
    return argv


def load_masters(directory):
    """The fp32 weights of a checkpoint, whatever number of processes wrote it."""
    files = [load_file(path) for path in sorted(directory.glob("state-*.training"))]
    names = [name for name in files[0] if name.startswith("master.")]
    return {name: torch.cat([file[name] for file in files]) for name in names}


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


VARIANTS = {  # options, processes, kills
    # 24 samples: epochs end within steps
    "passes and epochs": (["--num_iterations", "2", "--prompts_per_step", "5"], 1, 10),
    "lora": (["--lora_rank", "4", "--lora_dropout", "0.2", "--optimizer", "muon"], 1, 4),
    "two processes": (["--num_iterations", "2"], 2, 3),
}


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


@pytest.mark.parametrize("start, end", [(2, 1), (1, 2)])
def test_a_run_resumed_on_another_number_of_processes_continues_the_same_data(checkpoint, scenes, tmp_path, start, end):
    argv = argv_of(checkpoint, scenes, "--eval_every", "0", "--save_every", "2", "--prompts_per_step", "5")
    argv[argv.index("--learning_rate") + 1] = "1e-4"  # by which Adam multiplies what rounding makes of a gradient of 0
    argv = supervised(argv)  # nothing is drawn, so all can be compared
    Run([*argv, "--steps", "6"], tmp_path / "whole", main=sft.main).wait()
    Run([*argv, "--steps", "4"], tmp_path / "cut", start, main=sft.main).wait()
    Run([], tmp_path / "cut", end, main=sft.main, more=["--steps", "6"]).wait()
    whole, cut = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert [row["step"] for row in cut] == [1, 2, 3, 4, 5, 6]
    for expected, found in zip(only_numbers(whole), only_numbers(cut), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    masters = [load_masters(tmp_path / name / "checkpoints" / "step-000006") for name in ("whole", "cut")]
    assert masters[0].keys() == masters[1].keys()
    assert max((masters[0][name] - masters[1][name]).abs().max() for name in masters[0]) < 1e-6


def test_samples_set_aside_are_restored_with_the_checkpoint(checkpoint, tmp_path, reward):
    toy.scenes.write_split(tmp_path, "train", 12, seed=3)
    image = tmp_path / "train" / "00005.png"
    image.write_bytes(image.read_bytes()[:600])
    argv = argv_of(checkpoint, tmp_path, *reward, "--eval_every", "2", "--save_every", "2")
    argv[argv.index("--eval_data") + 1] = str(tmp_path / "train.jsonl")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_here([*argv, "--steps", "8"], whole)
    run_here([*argv, "--steps", "6"], cut)
    (cut / "checkpoints" / "step-000006").rename(tmp_path / "gone")
    set_aside = read_rows(whole / "bad_samples.jsonl")
    assert len(set_aside) == 1 and set_aside[0]["step"] <= 6
    run_here(["--resume", str(cut), "--steps", "8"])
    rows, expected = (only_numbers(read_rows(out / "metrics.jsonl")) for out in (cut, whole))
    assert [row["bad_samples"] for row in rows] == [row["bad_samples"] for row in expected]
    assert rows[-1]["bad_samples"] == 1 and read_rows(cut / "bad_samples.jsonl") == set_aside


# ---- ranks that die ------------------------------------------------------------------------------------------------

DEATHS = [("torchrun", "killed"), ("launch", "raised")]  # the other two were measured once
DYING_RUN = """
import os, signal
import train

calls, real = [], train.group_advantages

def dies(totals, size, **named):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) > 2:
        open(PATH, "w").write("now")
        if MODE == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("this is what went wrong")
    return real(totals, size, **named)

def main(config):
    train.group_advantages = dies
    train.main(config)

if __name__ == "__main__":
    import sys
    from infra import parallel
    from infra.config import TrainConfig
    from infra.options import parse_options
    config = parse_options(TrainConfig, sys.argv[1:])
    if "RANK" in os.environ:
        parallel.launch(main, config)
    else:
        import dying_run  # so that spawned processes find it
        parallel.spawn(2, parallel._run_and_report, dying_run.main, config)
"""


@pytest.mark.parametrize("launcher, mode", DEATHS)
def test_a_rank_that_dies_brings_the_others_down_and_its_error_is_shown(checkpoint, scenes, tmp_path, launcher, mode):
    script = tmp_path / "dying_run.py"
    script.write_text(f"PATH, MODE = {str(tmp_path / 'died')!r}, {mode!r}\n{DYING_RUN}")
    argv = options(checkpoint, scenes, tmp_path / "out", "--steps", "500", "--eval_every", "0")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*(torchrun if launcher == "torchrun" else []), str(script), *argv]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{tmp_path}"}
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE, capture_output=True, text=True, timeout=120, env=environment
    )
    seconds = time.time() - (tmp_path / "died").stat().st_mtime
    assert done.returncode not in (0, 2, 3) and seconds < 60
    assert "this is what went wrong" in done.stderr if mode == "raised" else "SIGKILL" in done.stderr


# ---- numbers that go bad -------------------------------------------------------------------------------------------


def spoil(monkeypatch, steps):
    """Makes the second group of these steps, counted from 1, have an infinite advantage."""
    count, real = [0], train.group_advantages

    def advantages(totals, size, **named):
        count[0] += 1
        values = real(totals, size, **named)
        if count[0] in steps:
            values[size] = torch.inf
        return values

    monkeypatch.setattr(train, "group_advantages", advantages)


def test_a_bad_step_is_written_down_with_its_samples_and_changes_nothing(
    checkpoint, scenes, tmp_path, reward, monkeypatch, capsys
):
    argv = argv_of(checkpoint, scenes, *reward, "--eval_every", "0", "--save_every", "1", "--steps", "3")
    spoil(monkeypatch, [2])
    run_here([*argv, "--keep_checkpoints", "9"], tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [0, 1, 0] and rows[1]["grad_norm"] is None
    [bad] = read_rows(tmp_path / "out" / "bad_steps.jsonl")
    [first] = [row["id"] for row in read_rows(tmp_path / "out" / "completions.jsonl") if row["step"] == 2]
    assert bad["step"] == 2 and bad["grad_norm"] is None and bad["skipped_updates"] == 1
    assert bad["samples"][0] == first and len(set(bad["samples"])) == 2  # both prompts of the step
    one, two, three = (load_masters(tmp_path / "out" / "checkpoints" / f"step-00000{n}") for n in (1, 2, 3))
    assert all(one[name].equal(two[name]) for name in one) and any(not two[name].equal(three[name]) for name in two)
    path = tmp_path / "out" / "bad_steps.jsonl"
    told = f"warning: step 2 has a loss or gradient that is not finite: no update, see {path}"
    assert told in capsys.readouterr().out


def test_bad_steps_in_a_row_stop_the_run_and_a_resume_goes_on_counting(
    checkpoint, scenes, tmp_path, reward, monkeypatch
):
    out = tmp_path / "out"
    argv = argv_of(checkpoint, scenes, *reward, "--eval_every", "0", "--save_every", "1", "--max_bad_steps", "3")
    spoil(monkeypatch, [2, 4, 5])  # no three in a row
    run_here([*argv, "--steps", "5"], out)
    monkeypatch.undo()
    spoil(monkeypatch, [1])
    with pytest.raises(ValueError, match=r"3 steps in a row, the last of them 6, .*bad_steps.jsonl.*step-000005"):
        run_here(["--resume", str(out), "--steps", "9"])
    assert [row["step"] for row in read_rows(out / "bad_steps.jsonl")] == [2, 4, 5, 6]
    monkeypatch.undo()
    run_here(["--resume", str(out), "--steps", "7"])  # the last good checkpoint is whole
    assert read_rows(out / "metrics.jsonl")[-1]["skipped_updates"] == 0


@pytest.mark.parametrize("limit", [2, 26])  # more than the steps that warnings look back on
def test_supervised_training_skips_and_stops_too(checkpoint, scenes, tmp_path, monkeypatch, limit):
    argv = argv_of(checkpoint, scenes, "--eval_every", "0", "--steps", "30", "--max_bad_steps", str(limit))
    argv = supervised(argv)
    real = sft.completion_logprobs
    monkeypatch.setattr(sft, "completion_logprobs", lambda *a, **o: [v * torch.nan for v in real(*a, **o)])
    with pytest.raises(ValueError, match=f"{limit} steps in a row, the last of them {limit}, "):
        sft.main(parse_options(SftConfig, [*argv, "--output_dir", str(tmp_path / "out")]))
    rows = read_rows(tmp_path / "out" / "bad_steps.jsonl")
    assert [len(set(row["samples"])) for row in rows] == [2] * limit and rows[0]["samples"][0].startswith("train-")


# ---- two ranks, one of them in trouble -----------------------------------------------------------------------------


def one_rank_in_trouble(config):
    """A run whose rank 1 finds no room for its first two saves, and an infinite advantage in the third step."""
    if os.environ["RANK"] == "1":
        patch = pytest.MonkeyPatch()
        full_disk(patch, (1, 2))
        real, count = train.group_advantages, [0]

        def advantages(*arguments, **named):
            count[0] += 1
            return real(*arguments, **named) * (torch.inf if count[0] == 3 else 1)

        patch.setattr(train, "group_advantages", advantages)
    return train.main(config)


def test_what_goes_wrong_on_one_rank_is_answered_by_all(checkpoint, scenes, tmp_path, reward):
    argv = argv_of(checkpoint, scenes, *reward, "--eval_every", "0", "--save_every", "1", "--keep_checkpoints", "9")
    Run([*argv, "--steps", "4"], tmp_path / "out", 2, main=one_rank_in_trouble).wait()
    saved = {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert saved == {"step-000003", "step-000004"}
    said = (tmp_path / "out.rank0").read_text()
    assert said.count("No space left on device") == 2 and "(rank 1)" in said
    assert [row["skipped_updates"] for row in read_rows(tmp_path / "out" / "metrics.jsonl")] == [0, 0, 1, 0]
    [bad] = read_rows(tmp_path / "out" / "bad_steps.jsonl")
    assert bad["step"] == 3 and len(set(bad["samples"])) == 2  # of both ranks, written by rank 0


def test_a_reward_that_fails_on_one_rank_stops_all_and_is_told_once(checkpoint, scenes, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\ndef bad(completion, answer):\n    return 1 / int(os.environ['RANK'] != '1')\n"
    )
    argv = argv_of(checkpoint, scenes, "--rewards", f"{tmp_path}/mine.py:bad", "--eval_every", "0", "--steps", "2")
    begun = time.monotonic()
    Run(argv, tmp_path / "out", 2).wait(parallel.USER_ERROR)
    assert time.monotonic() - begun < 60
    said = [(tmp_path / f"out.rank{rank}").read_text() for rank in (0, 1)]
    errors = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said[0] + said[1], said
    assert re.search(r"error: sample train-\d+: reward .*bad raised ZeroDivisionError: .*, for '", errors[0])
    assert errors[0].endswith("; mend the reward, or let such completions score 0 with --on_reward_error zero")


@pytest.mark.parametrize("answer", ["stop", "zero"])
def test_a_reward_that_fails_in_an_evaluation_is_answered_as_in_training(checkpoint, scenes, tmp_path, answer, capsys):
    (tmp_path / "mine.py").write_text("def bad(completion, answer):\n    return float('inf')\n")
    argv = argv_of(checkpoint, scenes, "--rewards", f"{tmp_path}/mine.py:bad", "--steps", "1")
    if answer == "stop":
        with pytest.raises(ValueError, match="sample .*bad gave inf, which is not a finite number.* 6 of 6 answers"):
            run_here(argv, tmp_path / "out")
        return
    run_here([*argv, "--on_reward_error", "zero"], tmp_path / "out")
    assert read_rows(tmp_path / "out" / "eval.jsonl")[0]["eval/test/reward"] == 0
    assert "6 of 6 answers score 0" in capsys.readouterr().out
