"""infra/runlog.py: where a run may write, what is written of it, what is kept, what a killed process leaves."""

import io
import json
import os
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import ALONE, CONFIG, argv_of, run_here
from PIL import Image

import infra.prompts
import infra.run
from infra.pictures import draw_group
from infra.runlog import RunLog, _drop_after, append_rows, open_run, read_rows

# ---- where a run may write -----------------------------------------------------------------------------------------


@pytest.fixture
def nothing_loads(monkeypatch):
    for module, name in ((infra.run, "load_policy"), (infra.prompts, "read_samples")):
        monkeypatch.setattr(module, name, lambda *names, **named: pytest.fail("something is loaded"))


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_loaded(
    checkpoint, scenes, tmp_path, nothing_loads
):
    (tmp_path / "file").write_text("notes")
    for out, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "out", "Not a directory")):
        with pytest.raises(ValueError) as error:
            run_here(argv_of(checkpoint, scenes), out)
        assert str(error.value) == f"output_dir {out} cannot be written ({reason}): give another --output_dir"
    assert (tmp_path / "file").read_text() == "notes"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written .Permission denied."):
        open_run(replace(CONFIG, output_dir=str(tmp_path)), ALONE)


def test_a_directory_that_holds_a_run_is_refused_and_left_as_it_was(checkpoint, scenes, tmp_path, nothing_loads):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError) as error:
        run_here(argv_of(checkpoint, scenes), tmp_path)
    told = f"{tmp_path} holds a run: give another --output_dir, or --resume {tmp_path} to continue it"
    assert str(error.value) == told
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_directory_with_other_files_is_taken_and_nothing_is_left_of_the_trial(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    for directory in (tmp_path, tmp_path / "new" / "deep"):
        assert open_run(replace(CONFIG, output_dir=str(directory)), ALONE) == directory
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "notes.txt"]
    assert not list((tmp_path / "new" / "deep").iterdir())


def test_a_run_without_a_directory_is_named_by_date_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = open_run(CONFIG, ALONE)
    time.strptime(out.name, "%Y%m%d-%H%M%S")
    assert out.parent.name == "runs" and out.is_dir()


# ---- what is written -----------------------------------------------------------------------------------------------


def test_the_options_are_written_with_the_files_that_follow_from_them(tmp_path):
    RunLog(tmp_path, CONFIG, ALONE, 0, 300)
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["options"]["group_size"] == CONFIG.group_size and about["versions"].keys() == {"torch", "transformers"}
    assert [file["rewards"] for file in about["files"]] == [["iou", "rec_format"]] and about["num_steps"] == 300


def test_numbers_that_json_lacks_are_written_as_null(tmp_path):
    row = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": float("-inf")}, "e": "nan"}
    assert append_rows(tmp_path / "rows.jsonl", [row])
    found = json.loads((tmp_path / "rows.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": None, "b": [None, 1.5], "c": {"d": None}, "e": "nan"}


def test_lines_that_a_full_disk_did_not_take_are_written_later(tmp_path, monkeypatch, capsys):
    log, real, room = RunLog(tmp_path, CONFIG, ALONE, 0, 300), os.write, [0]

    def write(number, data):
        if room[0]:
            return real(number, data)
        real(number, data[:5])
        return 5

    log.write("eval.jsonl", 0, {"a": 0.0})
    (tmp_path / "eval.jsonl").unlink()
    monkeypatch.setattr(os, "write", write)
    log.write("eval.jsonl", 1, {"a": 1.0})
    assert (tmp_path / "eval.jsonl").read_text() == "" and "wait to be written" in capsys.readouterr().out
    room[0] = 1
    log.write("eval.jsonl", 2, {"a": float("nan")})
    assert read_rows(tmp_path / "eval.jsonl") == [{"step": 1, "a": 1.0}, {"step": 2, "a": None}]


def test_tensorboard_keeps_the_step_resumed_from_and_hides_what_is_repeated(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = replace(CONFIG, tensorboard=True)
    for start, last in ((0, 5), (2, 4)):
        log = RunLog(tmp_path, config, ALONE, start, 300)
        for step in range(start, last + 1) if start == 0 else range(start + 1, last + 1):
            log.write("metrics.jsonl", step, {"reward": float(step + 10 * start)})
        log.tensorboard.close()
        time.sleep(1.1)  # the name of the file holds the second
    board = events.EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("reward")] == [(0, 0), (1, 1), (2, 2), (3, 23), (4, 24)]


GROUP_LINE = {
    "question": "the cat", "answer": "[2, 2, 6, 6]", "image_size": [8, 8], "input_size": [8, 8],
    "family": "qwen2_5_vl", "box_space": "",
    "group": [{"completion": "[1, 1, 3, 3]", "rewards": {"iou": 0.1}, "reward": 0.1, "advantage": 0.5}],
}  # fmt: skip


def test_tensorboard_gets_a_logged_group_as_an_image_where_asked_for(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Image.new("RGB", (8, 8), "navy").save(tmp_path / "image.png")
    group = {**GROUP_LINE, "images": [str(tmp_path / "image.png")]}
    for name, wanted in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        log = RunLog(tmp_path / name, replace(CONFIG, tensorboard=True, log_images=wanted), ALONE, 0, 300)
        log.write("completions.jsonl", 4, group)
        log.write("metrics.jsonl", 4, {"reward": 0.1})
        log.tensorboard.close()
        board = events.EventAccumulator(str(tmp_path / name / "tensorboard"))
        board.Reload()
        assert board.Tags()["images"] == (["group"] if wanted else [])
        if wanted:
            [event] = board.Images("group")
            drawn, expected = Image.open(io.BytesIO(event.encoded_image_string)), draw_group(group)
            assert event.step == 4 and drawn.tobytes() == expected.tobytes()


def test_wandb_gets_a_logged_group_as_an_image_and_one_that_cannot_be_read_is_a_warning(tmp_path, monkeypatch, capsys):
    sent = []
    fake = SimpleNamespace(
        init=lambda **named: SimpleNamespace(log=lambda row, step: sent.append((step, row))),
        Image=lambda picture, caption: (picture.size, caption),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "wandb")
    Image.new("RGB", (8, 8), "navy").save(tmp_path / "image.png")
    log = RunLog(tmp_path, replace(CONFIG, wandb=True, log_images=True), ALONE, 0, 300)
    log.write("completions.jsonl", 4, {**GROUP_LINE, "images": [str(tmp_path / "image.png")]})
    [(step, row)] = [(step, row) for step, row in sent if row]
    assert step == 4 and row["group"][1] == "the cat" and row["group"][0][0] == 512
    log.write("completions.jsonl", 5, {**GROUP_LINE, "images": [str(tmp_path / "gone.png")]})
    assert "warning: step 5: no picture of the group: " in capsys.readouterr().out
    assert len(read_rows(tmp_path / "completions.jsonl")) == 2 and len([row for _, row in sent if row]) == 1


# ---- what a killed process leaves ----------------------------------------------------------------------------------


def test_a_line_that_a_killed_process_left_half_written_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    _drop_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_resumed_run_drops_the_answers_of_an_evaluation_that_it_repeats(tmp_path):
    for step in (4, 8):
        append_rows(tmp_path / "answers.jsonl", [{"step": step, "id": "a"}])
        RunLog(tmp_path, CONFIG, ALONE, 5, 300)
        assert read_rows(tmp_path / "answers.jsonl") == [{"step": 4, "id": "a"}]


def test_completions_take_a_bounded_space_and_the_newest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("infra.runlog.MAX_COMPLETIONS_BYTES", 1000)
    log = RunLog(tmp_path, CONFIG, ALONE, 0, 300)
    for step in range(1, 101):
        log.write("completions.jsonl", step, {"text": "x" * 80})
        log.write("metrics.jsonl", step, {"text": "x" * 80})
    kept = [tmp_path / "completions.1.jsonl", tmp_path / "completions.jsonl"]
    whole = [[row["step"] for row in read_rows(path)] for path in kept]
    steps = sum(whole, [])
    assert steps == list(range(101 - len(steps), 101)) and 10 <= len(steps) < 25
    assert sum(path.stat().st_size for path in kept) < 2300
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100
    resumed = steps[3]  # before the file was changed last
    log = RunLog(tmp_path, CONFIG, ALONE, resumed, 300)
    log.write("completions.jsonl", resumed + 1, {"text": "x" * 80})
    assert [row["step"] for path in kept for row in read_rows(path)] == [*steps[:4], resumed + 1]
    for step in range(resumed + 2, 101):  # repeated from there, the files are what they were
        log.write("completions.jsonl", step, {"text": "x" * 80})
    assert [[row["step"] for row in read_rows(path)] for path in kept] == whole
