"""infra/terminal.py: the lines of a run, its bar in a pseudo-terminal of 80 columns, and what a log file gets."""

import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import CONFIG, options

import eval as evaluate
import sft
import train
from infra import terminal
from infra.config import EvalConfig
from infra.options import parse_options
from infra.report_data import read_evaluations
from infra.run import evaluate_command
from infra.runlog import read_rows
from infra.terminal import Terminal, clock, evaluation_line, score_table, step_figures, time_line

HERE = Path(__file__).parent.parent

# ---- lines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seconds, told", [(0, "0:00"), (9.6, "0:10"), (125, "2:05"), (3599.6, "1h00"), (43_320, "12h02")]
)
def test_a_time_is_told_in_two_units(seconds, told):
    assert clock(seconds) == told


GRPO = {"reward": 1.2, "reward_std": 0.1, "completion_tokens": 17.4, "groups_equal": 0.031, "loss": 0.0}
SECONDS = {"seconds_draw": 0.44, "seconds_score": 0.01, "seconds_learn": 12.6}


@pytest.mark.parametrize(
    "figures, score, told",
    [
        ({**GRPO, **SECONDS}, "acc 0.41", "reward 1.20 acc 0.41 len 17 equal 3% 0.4+0.0+13s"),
        ({**GRPO, **SECONDS}, "", "reward 1.20 len 17 equal 3% 0.4+0.0+13s"),  # without an evaluation
        ({"reward": 0.5, "seconds_draw": 1.0}, "", "reward 0.500 1.0s"),  # a figure that a step lacks is left out
        ({"loss": 0.25, "answer_tokens": 276.0, "grad_norm": 1.5, "seconds_learn": 0.25}, "IoU 0.30",
         "loss 0.250 IoU 0.30 tokens 276 gradient 1.5 0.2s"),
        ({"loss": float("nan"), "grad_norm": float("inf"), "seconds_learn": 0.25}, "", "loss nan gradient inf 0.2s"),
    ],
)  # fmt: skip
def test_a_step_is_told_in_six_figures(figures, score, told):
    assert " ".join(step_figures(figures, score)) == told


def test_the_longest_line_of_a_bar_fits_80_columns():
    figures = {"reward": -0.12345, "completion_tokens": 2048.0, "groups_equal": 1.0}
    seconds = {"seconds_draw": 20.0, "seconds_score": 9.9, "seconds_learn": 40.0}
    text = f"12345/20000 # {clock(359_940)} left  {' '.join(step_figures(figures | seconds, 'acc 0.41'))}"
    assert len(text) <= 79, text


def test_an_evaluation_is_told_with_its_change_since_the_start():
    summary = {"samples": 8, "accuracy": 0.5, "accuracy_low": 0.2, "mean_iou": 0.25, "truncated": 0.0}
    start = {"step": 0, "accuracy": 0.25, "mean_iou": 0.375}
    told = "step 1,200, val: accuracy 0.500 (+0.250), mean IoU 0.250 (-0.125)"
    assert evaluation_line(1200, "val", summary, start) == told
    assert evaluation_line(0, "val", start, start) == "step 0, val: accuracy 0.250, mean IoU 0.375"


def test_the_table_has_each_set_at_the_start_at_its_best_and_at_the_end():
    rows = [
        {"step": step, "accuracy": value, "accuracy_low": value - 0.125, "accuracy_high": value + 0.125}
        | {"mean_iou": value / 2, "mean_iou_low": 0.0, "mean_iou_high": 1.0}
        for step, value in ((0, 0.25), (1000, 0.75), (20_000, 0.5))
    ]
    assert score_table({"a_long_name_of_a_set": rows, "od": [{"step": 5, "map": 0.125}]}) == [
        "a_long_name_of_a_set",
        "             first, step 0         best, step 1,000      last, step 20,000",
        "  accuracy   0.250 (0.12 to 0.38)  0.750 (0.62 to 0.88)  0.500 (0.38 to 0.62)",
        "  mean IoU   0.125 (0.00 to 1.00)  0.375 (0.00 to 1.00)  0.250 (0.00 to 1.00)",
        "od           first, step 5         best, step 5          last, step 5",
        "  mAP        0.125                 0.125                 0.125",
    ]
    assert score_table({}) == []


def test_the_time_left_counts_steps_saves_and_the_evaluations_to_come(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    shown = Terminal(replace(CONFIG, eval_every=4), first=False)
    shown.begin(0, 10)
    for phase, seconds in (("evaluate", 30.0), ("save", 0.0)):
        with shown.aside_from_steps(phase):
            now[0] += seconds
    for step, seconds, saving in ((1, 2.0, 0.0), (2, 2.0, 3.0), (3, 9.0, 0.0)):
        now[0] += seconds
        shown.end_step(step, {"seconds_draw": 1.0, "seconds_learn": 0.5})
        with shown.aside_from_steps("save"):
            now[0] += saving
    # 7 steps of 2 s (the median) and a save of 3 s in 3 steps; evaluations after steps 4, 8 and 10
    assert shown.seconds_left() == pytest.approx(7 * (2 + 1) + 3 * 30)
    now[0] += 2.0
    shown.end_step(4, {})
    assert shown.seconds_left() == pytest.approx(6 * (2 + 3 / 4) + 3 * 30)  # that of this step is still to come
    now[0] += 2.0
    shown.end_step(5, {})
    assert shown.seconds_left() == pytest.approx(5 * (2 + 3 / 5) + 2 * 30)
    assert shown.spent == Counter(evaluate=30.0, save=3.0, draw=3.0, learn=1.5)
    assert time_line(shown) == "0:50, evaluate 60%, save 6%, draw 6%, learn 3%, rest 25%"


def test_words_are_not_broken_in_a_terminal_and_commands_stay_whole(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/path/that-is-longer/than-a/line-of-the-terminal.jsonl"
    terminal.say(f"warning: the samples of {path} have boxes that leave their image")
    terminal.say(f"python train.py --resume {path}", whole=True)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "warning: the samples of", f"  {path}", "  have boxes that leave their image",
        f"python train.py --resume {path}",
    ]  # fmt: skip


# ---- whole runs ----------------------------------------------------------------------------------------------------


def in_terminal(argv):
    """(exit code, what is written, the lines that stand on the screen at the end) of a command in a terminal."""
    child, number = pty.fork()
    if child == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.chdir(HERE)
        os.execv(sys.executable, [sys.executable, *argv])
    raw = b""
    while True:
        try:
            raw += os.read(number, 65536)
        except OSError:  # the other end is closed
            break
    os.close(number)
    text = raw.decode().replace("\r\n", "\n")
    screen = []
    for line in text.split("\n"):
        cells = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        screen.append("".join(cells).rstrip())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text, screen


def into_a_pipe(argv):
    done = subprocess.run([sys.executable, *argv], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.decode()


MORE = ("--steps", "7", "--eval_every", "3", "--log_every", "4", "--eval_batch_size", "4")


def test_a_terminal_of_80_columns_shows_a_header_one_bar_evaluations_and_a_table(checkpoint, scenes, reward, tmp_path):
    out = tmp_path / "out"
    code, text, screen = in_terminal(["train.py", *options(checkpoint, scenes, out, *MORE, *reward)])
    assert code == 0, text
    drawn = [part for line in text.split("\n") for part in line.split("\r")]
    bars = [part for part in drawn if part.startswith(tuple(f"{step}/7 " for step in range(8)))]
    steps = [bar for bar in bars if "left" in bar]
    assert steps and all(len(bar) <= 80 for bar in bars) and "\x1b" not in text.partition("data    ")[2]
    for name in ("reward ", " eval ", " len ", " equal ", "+"):
        assert all(name in bar for bar in steps)
    assert any("evaluating test: 4/6" in bar for bar in bars)
    assert not any(line.startswith(tuple(f"{step}/7" for step in range(8))) for line in screen)  # the bar is gone
    for head in (
        "model   ",
        "data    train: 24 samples",
        "steps   7 of 2 prompts x 3 completions, paid by length",
        "output  ",
    ):
        assert any(line.startswith(head) for line in screen), head
    [line] = [line for line in screen if line.startswith("step 7, test: ")]
    assert re.search(r"\([+-]\d\.\d{3}\)$", line)
    assert not any(line.startswith("step 1") for line in screen)  # the bar shows steps, and no line
    assert "Writing model shards" not in text
    assert screen[-2:] == [f"a page to look at: {out / 'report.html'}", ""]


def test_a_log_file_has_short_lines_and_nothing_that_redraws(checkpoint, scenes, reward, tmp_path):
    out = tmp_path / "out"
    code, text = into_a_pipe(["train.py", *options(checkpoint, scenes, out, *MORE, *reward)])
    assert code == 0, text
    assert not {"\r", "\x1b"} & set(text) and "Loading weights" not in text and "Writing model shards" not in text
    lines = text.splitlines()
    steps = [line.split() for line in lines if line.startswith("step ") and "/7 " in line]
    rows = read_rows(out / "metrics.jsonl")
    assert [line[1] for line in steps] == ["1/7", "4/7", "7/7"]
    for line, row in zip(steps, (rows[0], rows[3], rows[6]), strict=True):
        assert line[2::2][:2] == ["reward", "length"] and line[-1] == "left" and line[-3] == "s"
        assert float(line[3]) == pytest.approx(row["reward"], abs=5e-3)
        assert float(line[5]) == pytest.approx(row["completion_tokens"], abs=0.051)
    evaluated = [line for line in lines if line.startswith("step ") and ", test: " in line]
    assert [line.split(",")[0] for line in evaluated] == ["step 0", "step 3", "step 6", "step 7"]
    assert lines[-1] == f"a page to look at: {out / 'report.html'}"
    [table] = [number for number, line in enumerate(lines) if line.startswith("test  ")]
    assert lines[table].split("  ")[-1].strip() == "last, step 7" and lines[table + 1].startswith("  reward ")
    assert json.loads((out / "config.json").read_text())["num_steps"] == 7


def test_a_run_that_is_resumed_tells_the_change_since_its_first_start(checkpoint, scenes, reward, tmp_path, capsys):
    argv, out = options(checkpoint, scenes, tmp_path / "out", "--steps", "2", "--eval_every", "1", *reward), tmp_path
    train.main(parse_options(train.TrainConfig, argv))
    [start, *_] = read_evaluations(out / "out")["test"]
    capsys.readouterr()
    train.main(parse_options(train.TrainConfig, ["--resume", str(out / "out"), "--steps", "3"]))
    said = capsys.readouterr().out
    last = read_evaluations(out / "out")["test"][-1]
    assert last["step"] == 3 and f"reward {last['reward']:.3f} ({last['reward'] - start['reward']:+.3f})" in said
    assert "first, step 0         best, step " in said


def test_the_command_at_the_end_evaluates_the_best_checkpoint_as_the_run_did(checkpoint, scenes, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--steps", "1", "--eval_every", "1", "--image_root", str(scenes)]
    config = parse_options(train.TrainConfig, options(checkpoint, scenes, out, *more))
    train.main(config)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("to evaluate: ")]
    words = shlex.split(line.removeprefix("to evaluate: "))
    assert words[:2] == ["python", "eval.py"] and words[-2:] == ["--image_root", str(scenes)]
    evaluate.main(parse_options(EvalConfig, words[2:]))
    last = read_evaluations(out)["test"][-1]
    assert json.loads(capsys.readouterr().out) == {"test": {key: last[key] for key in last if key != "step"}}


def test_the_command_names_a_mix_and_asks_for_a_file_where_samples_were_held_out():
    assert evaluate_command(replace(CONFIG, data="d"), "OUT/best").endswith("--model OUT/best --data FILE")
    here = replace(CONFIG, eval_data=[str(Path.cwd() / "a b.json"), "/x/c.json"])
    assert evaluate_command(here, "OUT/best").endswith("--data 'a b.json' /x/c.json")


def test_sft_and_eval_show_their_bars_in_a_terminal_alone(checkpoint, scenes, tmp_path, capsys):
    argv = ["--model", checkpoint, "--data", str(scenes / "train.jsonl"), "--template", "plain", "--min_pixels", "256"]
    config = parse_options(
        sft.SftConfig,
        [*argv, "--eval_data", str(scenes / "test.jsonl"), "--output_dir", str(tmp_path), "--prompts_per_step", "2",
         "--steps", "2", "--eval_every", "2", "--max_completion_tokens", "4"],
    )  # fmt: skip
    sft.main(config)
    said = capsys.readouterr()
    assert "steps   2 of 2 samples\n" in said.out and "step 2/2  loss " in said.out and "\r" not in said.out + said.err
    told = [
        "eval.py", "--model", checkpoint, "--data", str(scenes / "test.jsonl"), "--template", "plain",
        "--max_completion_tokens", "4", "--batch_size", "2",
    ]  # fmt: skip
    code, text, screen = in_terminal(told)
    assert (
        code == 0
        and re.search(r"test: +\d+%\|", text)
        and any(line.startswith("test: accuracy 0.000 (0.00 to ") for line in screen)
    )
    code, text = into_a_pipe(told)
    assert code == 0 and "\r" not in text and "test: accuracy 0.000 (0.00 to " in text
