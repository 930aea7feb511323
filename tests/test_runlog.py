"""journal.py: what is written of a run, what is kept, what a killed process left."""

from helpers import ALONE, CONFIG, run

import train
from infra.runlog import RunLog, _drop_after, read_rows


def test_a_line_that_a_killed_process_left_half_written_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    _drop_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_completions_take_a_bounded_space_and_the_newest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("journal.MAX_COMPLETIONS_BYTES", 1000)
    log = RunLog(tmp_path, CONFIG, ALONE, 0)
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
    log = RunLog(tmp_path, CONFIG, ALONE, resumed)
    log.write("completions.jsonl", resumed + 1, {"text": "x" * 80})
    assert [row["step"] for path in kept for row in read_rows(path)] == [*steps[:4], resumed + 1]
    for step in range(resumed + 2, 101):  # repeated from there, the files are what they were
        log.write("completions.jsonl", step, {"text": "x" * 80})
    assert [[row["step"] for row in read_rows(path)] for path in kept] == whole


def test_only_the_newest_checkpoints_and_the_best_are_kept(checkpoint, scenes, tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.2, 0.3, 0.4])
    monkeypatch.setattr(train, "evaluate_sets", lambda *arguments, **named: next(scores))
    run(
        checkpoint,
        scenes,
        tmp_path / "out",
        "--steps",
        "4",
        "--eval_every",
        "1",
        "--save_every",
        "1",
        "--keep_checkpoints",
        "1",
    )
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["step-000001", "step-000004"]
    assert (tmp_path / "out" / "best").resolve().name == "step-000001"
