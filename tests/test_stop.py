"""infra/stop.py: a run that is told to stop acknowledges it at once, ends after a whole step, saves, and can go on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ALONE, argv_of, options, run_here

import infra.keeper
import infra.run
from infra import parallel
from infra.runlog import read_rows
from infra.stop import StopSignal

HERE = Path(__file__).parent.parent


def lines(out):
    return sum(path.read_bytes().count(b"\n") for path in out.glob("metrics.jsonl"))


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_a_time_limit_stops_before_the_step_that_would_pass_it(
    checkpoint, scenes, tmp_path, reward, launcher, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["/where/it/lies/train.py"])
    start = "python train.py"
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        start = "torchrun --nproc_per_node 4 train.py"
    argv = argv_of(checkpoint, scenes, *reward, "--eval_every", "0", "--steps", "500")
    begun = time.monotonic()
    assert run_here([*argv, "--max_hours", str(4 / 3600)], tmp_path / "out") == parallel.STOPPED == 3
    steps = [row["step"] for row in read_rows(tmp_path / "out" / "metrics.jsonl")]
    assert 0 < len(steps) < 500 and time.monotonic() - begun < 5
    assert (tmp_path / "out" / "checkpoints" / f"step-{steps[-1]:06d}").exists()
    told = f"stopped after step {steps[-1]} of 500; to continue: {start} --resume {tmp_path / 'out'}\n"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("where", ["evaluation", "save"])
def test_a_signal_during_an_evaluation_or_a_save_is_acknowledged_at_once_and_stops_after_it(
    checkpoint, scenes, tmp_path, reward, where, monkeypatch, capfd
):
    module, name = {"evaluation": (infra.run, "answer_samples"), "save": (infra.keeper, "save_checkpoint")}[where]
    real, acknowledged = getattr(module, name), []

    def signalled(*arguments, **named):
        if lines(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGINT if not acknowledged else signal.SIGTERM)
            acknowledged.append(capfd.readouterr().err)
        return real(*arguments, **named)

    monkeypatch.setattr(module, name, signalled)
    argv = argv_of(checkpoint, scenes, *reward, "--eval_every", "2", "--save_every", "2", "--steps", "6")
    try:
        assert run_here(argv, tmp_path / "out") == 3
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    told = "\nstopping after this step, then saving; press Ctrl-C again to stop at once without saving\n"
    assert acknowledged[0].endswith(told)
    # The run hears of it after the step whose evaluation or save it came in, so the next step is the last.
    assert lines(tmp_path / "out") == 3 and (tmp_path / "out" / "checkpoints" / "step-000003").exists()


def test_a_second_ctrl_c_stops_at_once_but_not_the_same_one_heard_twice(capfd):
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the terminal and a launcher
    assert stop.agreed(ALONE)
    stop.received -= 1
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert capfd.readouterr().err.count("stopping after this step") == 1


@pytest.mark.parametrize("launcher", ["one process", "spawn", "torchrun"])
def test_an_interrupted_run_saves_ends_without_a_traceback_and_says_how_to_continue(
    checkpoint, scenes, tmp_path, reward, launcher
):
    out = tmp_path / "out"
    argv = options(checkpoint, scenes, out, *reward, "--eval_every", "0", "--steps", "5000")
    spawned = f"from infra import parallel; parallel.spawn(2, parallel._run_and_report, train.main, c); {argv!r}"
    command = {
        "one process": ["train.py", *argv],
        "spawn": ["-c", f"{PARSED.format(argv)}; {spawned}"],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py", *argv],
    }[launcher]
    start = subprocess.Popen(
        [sys.executable, *command],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    while not lines(out) and start.poll() is None:
        time.sleep(0.05)
    os.killpg(start.pid, signal.SIGINT)  # as a terminal sends it: to all processes at once
    said = start.communicate(timeout=100)[0]
    # torchrun itself ends with 1 after a signal; it prints a traceback of its own, which is not ours to prevent.
    assert start.returncode == {"one process": 3, "spawn": 3, "torchrun": 1}[launcher], said
    script = "torchrun --nproc_per_node 2 train.py" if launcher == "torchrun" else r"python \S+"
    assert re.search(rf"stopped after step \d+ of 5000; to continue: {script} --resume {out}\n", said), said
    assert said.count("stopping after this step, then saving") == 1 and list(out.glob("checkpoints/step-*"))
    if launcher != "torchrun":
        assert "Traceback" not in said


PARSED = (
    "import train; from infra.config import TrainConfig; from infra.options import parse_options; "
    "c = parse_options(TrainConfig, {!r})"
)
