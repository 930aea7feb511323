"""tools.findings: runs that are reused and end together, intervals by hand, tables, figures, and a tiny finding."""

import json
import shlex
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from xml.etree import ElementTree

import numpy as np
import pytest

import toy
from infra.config import EvalConfig, SftConfig, TrainConfig
from infra.options import parse_options
from infra.report_page import Line
from infra.runlog import read_rows
from tools.findings import __main__ as command
from tools.findings import runner
from tools.findings.__main__ import alone
from tools.findings.experiments import FINDINGS, FULL, QUICK, START, VARIANT, Arm
from tools.findings.figure import curves, dots
from tools.findings.measures import answer_figures, asked_classes, drawn
from tools.findings.plan import plan, write_loosened
from tools.findings.runner import DONE, Job, run_jobs
from tools.findings.tables import compare_all, difference, interval, judge, markdown_table
from toy.model import build_model, build_processor

CONFIGS = {"train": TrainConfig, "sft": SftConfig, "eval": EvalConfig}
FIGURES = {
    "start": {"test": [0.25, 0.25, 0.25]},
    "grpo": {"test": [0.1, 0.4, 0.7], "KL": [0.5, 0.5, 0.5]},
    "other": {"test": [0.21, 0.5, 0.79], "KL": [0.1, 0.9, 0.6]},
}


def append_job(path, text="x"):
    """A job that adds a letter to a file, so that the test sees how often it ran."""
    return Job((f"-c \"open('{path}', 'a').write('{text}')\"",))


# ---- intervals, sentences, tables ----------------------------------------------------------------------------------


def test_interval_is_students_t_as_worked_by_hand():
    # Mean 0.6, deviation 0.1, t of two degrees of freedom 4.3027: 4.3027 * 0.1 / sqrt(3) = 0.2484.
    assert interval([0.5, 0.6, 0.7]) == pytest.approx((0.6, 0.2484), abs=1e-4)
    # Deviation sqrt(2), t of one degree of freedom 12.7062: 12.7062 * sqrt(2) / sqrt(2).
    assert interval([1.0, 3.0]) == pytest.approx((2.0, 12.7062))
    assert interval([0.3]) == (0.3, float("inf"))


def test_differences_are_paired_by_seed():
    # 0.11, 0.10 and 0.09: mean 0.1, half width 4.3027 * 0.01 / sqrt(3) = 0.0248, though each arm spreads by 0.3.
    verdict, middle, half = difference(FIGURES, "test", "other", "grpo")
    assert (verdict, middle, half) == ("higher", pytest.approx(0.1), pytest.approx(0.0248, abs=1e-4))
    assert difference(FIGURES, "test", "grpo", "other")[0] == "lower"
    assert difference(FIGURES, "KL", "grpo", "other")[0] == "not different"
    assert difference(FIGURES, "test", "start", "start")[0] == "not different"
    assert difference(FIGURES, "test", "start", "")[0] == "higher"  # than zero


def test_claims_are_shown_partly_or_not():
    right, wrong = ("other", "higher", "grpo", "test"), ("other", "higher", "grpo", "KL")
    assert judge(FIGURES, [right]).startswith("**shown**: 1 of 1")
    assert judge(FIGURES, [right, wrong]).startswith("**partly shown**: 1 of 2")
    assert judge(FIGURES, [wrong]).startswith("**not shown**: 0 of 1")
    missing = judge(FIGURES, [("start", "lower", "grpo", "KL"), right])
    assert missing.startswith("**partly shown**: 1 of 2") and "- no: start or grpo has no KL" in missing
    assert "- no: KL of other is not different from grpo (+0.033 ± " in judge(FIGURES, [wrong])
    assert "other is higher than grpo (+0.100 ± 0.025)" in compare_all(FIGURES, "test", "grpo")


def test_table_has_a_cell_for_each_column_and_a_dash_where_there_is_no_figure():
    head, rule, *rows = [line.strip("|").split("|") for line in markdown_table(FIGURES, ["test", "KL"]).splitlines()]
    assert [len(row) for row in (head, rule, *rows)] == [3] * 5
    assert [cell.strip() for cell in rows[0]] == ["start", "0.250", "-"]  # one evaluation has no interval
    assert rows[1][1].strip() == "0.400 ± 0.745"


# ---- figures -------------------------------------------------------------------------------------------------------


def test_dots_are_valid_svg_and_lie_where_the_values_are():
    page = ElementTree.fromstring(dots("a & b", FIGURES, ["test", "KL"]))
    circles = [float(circle.get("cx")) for circle in page.findall(".//{*}circle")]
    assert len(circles) == 5 and "a & b" in [text.text for text in page.findall(".//{*}text")]
    # The panel of `test` is 150 wide from x = 170, and goes from 0.4 - 0.7453 (grpo) to 0.5 + 0.7204 (other).
    assert circles[1] == pytest.approx(170 + 150 * 0.7453 / (0.1 + 0.7453 + 0.7204), abs=0.1)
    assert circles[0] < circles[1] < circles[2]
    assert ElementTree.fromstring(dots("one value", {"only": {"x": [2.0]}}, ["x", "missing"])) is not None


def test_curves_are_valid_svg_with_colours_of_their_own():
    line = Line("RL", np.array([0.0, 50.0, 100.0]), np.array([0.2, 0.3, 0.4]), np.array([[0.1, 0.3]] * 3))
    text = curves("t", "percent", {"test": [line, line], "pairs": [line, line]})
    page = ElementTree.fromstring(text)
    assert len(list(page.findall(".//{*}polygon"))) == 4 and "var(" not in text


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_is_reused_only_under_the_same_command_line(tmp_path):
    job, told = append_job(tmp_path / "count"), []
    run_jobs([job, job], tmp_path, 2, told.append)
    run_jobs([job], tmp_path, 1, told.append)
    assert (tmp_path / "count").read_text() == "x"
    assert told[0].startswith("1 runs to do, 2 at a time, in ") and told[1].startswith("1/1 runs  0:00 left")
    assert told[2:] == ["1 of 1 runs are done already"]
    run_jobs([append_job(tmp_path / "count", "y")], tmp_path, 1, told.append)
    assert (tmp_path / "count").read_text() == "xy"
    mark = tmp_path / job.name / DONE
    mark.write_text(json.dumps({"line": "another", "seconds": 1}))
    run_jobs([job], tmp_path, 1, told.append)
    assert (tmp_path / "count").read_text() == "xyx"


def test_a_second_call_in_the_same_directory_is_refused(tmp_path):
    with alone(tmp_path):
        with pytest.raises(ValueError, match="another call works here; wait for it, or give another --output_dir"):
            with alone(tmp_path):
                pass
    with alone(tmp_path):
        pass


def test_a_cut_off_run_begins_again(tmp_path):
    job = Job(("-c \"open('{out}/copy', 'x').write('whole')\"",))
    cut_off = tmp_path / job.name
    cut_off.mkdir()
    (cut_off / "copy").write_text("half")  # the run would stop if this was still there
    run_jobs([job], tmp_path, 2, lambda text: None)
    assert (cut_off / "copy").read_text() == "whole"


def test_heavy_files_go(tmp_path):
    line = "-c \"import os; os.makedirs('{out}/checkpoints/step-1'); os.symlink('checkpoints/step-1', '{out}/best')\""
    job = Job((line,))
    run_jobs([job], tmp_path, 2, lambda text: None)
    assert {path.name for path in (tmp_path / job.name).iterdir()} == {"log.txt", DONE}


def test_a_failed_run_names_its_log_and_ends_the_others(tmp_path):
    pid = tmp_path / "pid"
    sleeper = Job((f"-c \"import os, time; open('{pid}', 'w').write(str(os.getpid())); time.sleep(60)\"",))
    waits = "import os, time\nwhile not os.path.exists('%s'): time.sleep(0.05)\ntime.sleep(0.2)\nraise SystemExit('no')"
    failing = Job((f"-c {shlex.quote(waits % pid)}",))
    with pytest.raises(ValueError, match=f"(?s)code 1.*\nno\nsee .*{failing.name}/log.txt"):
        run_jobs([sleeper, failing], tmp_path, 2, lambda text: None)
    assert ends(int(pid.read_text()))
    assert not (tmp_path / failing.name / DONE).exists()


def test_ctrl_c_ends_the_children(tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    job = Job((f"-c \"import os, time; open('{pid}', 'w').write(str(os.getpid())); time.sleep(60)\"",))
    sleep = time.sleep

    def interrupt(seconds):
        if pid.exists() and pid.read_text():
            monkeypatch.undo()  # what ends the child sleeps too
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(runner.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job], tmp_path, 1, lambda text: None)
    assert ends(int(pid.read_text()))


def ends(pid):
    """Whether a process that was killed is gone within some seconds; a zombie counts as gone."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


# ---- findings ------------------------------------------------------------------------------------------------------


def test_unknown_names_are_refused_with_the_list(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["generalize"])
    assert stopped.value.code == 2 and "generalise" in capsys.readouterr().err


@pytest.mark.parametrize("name", FINDINGS)
def test_each_arm_is_a_command_line_that_the_commands_take(name, tmp_path):
    jobs = {job for seeds in plan(FINDINGS[name], FULL).values() for job in seeds}
    for job in jobs:
        for line in job.commands:
            for place in ("{data}", "{out}"):
                line = line.replace(place, str(tmp_path))
            script, *words = shlex.split(line)
            if "--model" in words:
                words[words.index("--model") + 1] = str(toy.MODEL)  # the weights need not be there
            kind = script.removesuffix(".py")
            config = parse_options(CONFIGS[kind], words, preset=toy.PRESETS[kind])
            assert isinstance(config, CONFIGS[kind])
            given = dict(pairwise(words))  # of an option that is given twice, the last counts
            for word in {"--seed", "--steps"} & given.keys():
                assert str(getattr(config, word[2:])) == given[word]


@pytest.mark.parametrize("name", FINDINGS)
def test_each_command_of_the_real_size_is_one_that_the_commands_take(name):
    for line in FINDINGS[name].full_size.replace("\\\n", " ").splitlines():
        python, script, *words = shlex.split(line)
        assert python == "python"
        if "OUT/best" in words:
            words[words.index("OUT/best")] = str(toy.MODEL)
        parse_options(CONFIGS[script.removesuffix(".py")], words, preset={})


def test_claims_and_sentences_name_arms_and_columns_that_are_there():
    for finding in FINDINGS.values():
        names = {arm.name for arm in finding.arms}
        assert finding.base in names and set(finding.compared) <= set(finding.columns)
        for first, expected, second, column in finding.claims:
            assert {first, second} <= names | {""} and expected in ("higher", "lower") and column in finding.columns


def test_loose_answers_keep_questions_and_images_and_push_each_side_out(tmp_path):
    toy.ensure_data(map(str, toy.FILES.values()))
    write_loosened(toy.FILES["test"], tmp_path / "loose.jsonl")
    for tight, loose in zip(read_rows(toy.FILES["test"]), read_rows(tmp_path / "loose.jsonl"), strict=True):
        old, new = (json.loads(record["conversations"][1].pop("value")) for record in (tight, loose))
        assert tight == loose
        assert new[0] <= old[0] and new[1] <= old[1] and new[2] >= old[2] and new[3] >= old[3]


def test_figures_of_detection_answers_worked_by_hand():
    box, far = [0, 0, 10, 10], [30, 30, 40, 40]
    rows = [
        {  # boxes both asked classes, of which one is there, and says so
            "question": "all of: red circle, blue square",
            "completion": "<think>red circle, blue square</think><answer>x</answer>",
            "predicted": [(box, "red circle"), (far, "blue square")],
            "true": [(box, "red circle")],
        },
        {  # says and boxes exactly what is there
            "question": "all of: green square",
            "completion": "<think>green square</think><answer>x</answer>",
            "predicted": [(far, "green square")],
            "true": [(far, "green square")],
        },
    ]
    figures = answer_figures(rows)
    at_once = [row | {"completion": "<think></think><answer>x</answer>"} for row in rows]
    assert "right thoughts" not in answer_figures(at_once)  # an empty thought is none
    assert figures["boxes / true"] == 1.5 and figures["wrong labels"] == 0.5
    assert figures["precision, absent"] == 0.5 and figures["only present"] == 0.0 and figures["right thoughts"] == 0.5
    assert asked_classes("<image>all of: red circle, blue square at once") == ["red circle", "blue square"]


def test_drawn_figures_are_those_of_the_last_tenth(tmp_path):
    rows = [{"step": step, "entropy": float(step), "seconds_draw": 1.0, "seconds_learn": 0.5} for step in range(1, 21)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert drawn(tmp_path) == {"entropy": 19.5, "seconds": 30.0}
    assert drawn(tmp_path / "none") == {}


def test_a_tiny_finding_runs_is_measured_and_is_reused(tmp_path, monkeypatch, capsys):
    arms = (START, Arm("grpo"))
    finding = replace(VARIANT, arms=arms, claims=(("grpo", "higher", "start", "test"),), compared=("test",))
    monkeypatch.setitem(command.FINDINGS, "variant", finding)
    line = ["variant", "--quick", "--jobs", "2", "--output_dir", str(tmp_path)]
    assert command.main(line) == 0
    home, printed = tmp_path / "quick", capsys.readouterr()
    runs = [home / job.name for job in plan(finding, QUICK)["grpo"]]
    last = [read_rows(run / "eval.jsonl")[-3]["eval/test/accuracy"] for run in runs]  # then pairs and relations
    assert f"| grpo | {mean(last):.3f}" in printed.out and printed.out.startswith((home / "variant.md").read_text())
    assert len(list(ElementTree.parse(home / "variant.svg").getroot().findall(".//{*}circle"))) > 5
    times = [(run / DONE).stat().st_mtime_ns for run in runs]
    assert command.main(line) == 0
    again = capsys.readouterr()
    assert again.out == printed.out and "3 of 3 runs are done already" in again.err
    assert times == [(run / DONE).stat().st_mtime_ns for run in runs]


def test_a_tiny_detection_finding_runs_from_a_start_without_weights(tmp_path, monkeypatch, capsys):
    processor = build_processor(detection=True)
    build_model(processor.tokenizer).save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    monkeypatch.setattr(toy, "DETECTION", tmp_path / "start")
    monkeypatch.setitem(toy.DETECTION_OPTIONS, "model", str(tmp_path / "start"))
    monkeypatch.setitem(command.FINDINGS, "aha", replace(FINDINGS["aha"], arms=FINDINGS["aha"].arms[1:], claims=()))
    monkeypatch.setattr(command, "QUICK", replace(QUICK, seeds=(0,), detection_steps=1))
    assert command.main(["aha", "--quick", "--output_dir", str(tmp_path)]) == 0
    head, _, *rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[1].strip() for row in rows] == ["start, at once", "thinking", "at once"]
    assert all(float(row[head.index(" recall ")]) == 0 for row in rows)  # it has learned nothing
    assert list((tmp_path / "quick").glob("train-*/checkpoints")) == []
