"""infra/keeper.py: which checkpoints are kept, the link to the best, failed saves, and what a run resumes on."""

import errno
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import argv_of, assert_equal, full_disk, outcome, run_here, set_rank, spawn

import infra.run
import toy.model
from data import Sample
from infra import checkpoint as checkpoint_file
from infra.keeper import model_fingerprint
from infra.prompts import RunSamples
from infra.run import describe_evaluation


def score_so(monkeypatch, *scores):
    """Makes the evaluations of a run give these scores, the one before the first step included."""
    rest = iter(scores)
    monkeypatch.setattr(infra.run.Run, "evaluate", lambda run: next(rest))


def saved(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_only_the_newest_checkpoints_and_the_best_are_kept(checkpoint, scenes, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    score_so(monkeypatch, 0.1, 0.5, 0.2, 0.3, 0.4)
    more = ["--steps", "4", "--eval_every", "1", "--save_every", "1", "--keep_checkpoints", "1"]
    run_here(argv_of(checkpoint, scenes, *more), out)
    assert saved(out) == ["step-000001", "step-000004"]
    assert (out / "best").resolve().name == "step-000001"
    assert f"best: step 1, score 0.5000: {out / 'best'}\n" in capsys.readouterr().out


def test_where_nothing_beats_the_start_there_is_no_best_and_the_run_says_so(
    checkpoint, scenes, tmp_path, monkeypatch, capsys
):
    score_so(monkeypatch, 0.25, 0.25, 0.2)  # equal is not better
    run_here(argv_of(checkpoint, scenes, "--steps", "2", "--eval_every", "1"), tmp_path / "out")
    assert not (tmp_path / "out" / "best").exists() and saved(tmp_path / "out") == ["step-000002"]
    told = "no checkpoint beats the model that the run began with, which scores 0.2500\n"
    assert told in capsys.readouterr().out


def test_the_link_to_the_best_is_made_where_a_run_died_before_it(checkpoint, scenes, tmp_path, reward, monkeypatch):
    out = tmp_path / "out"
    score_so(monkeypatch, 0.1, 0.5, 0.2)
    argv = argv_of(checkpoint, scenes, *reward, "--eval_every", "1", "--save_every", "1", "--steps", "2")
    run_here(argv, out)
    assert (out / "best").resolve().name == "step-000001"
    (out / "best").unlink()
    run_here(["--resume", str(out), "--eval_every", "0"])  # nothing is left to do
    assert (out / "best").resolve().name == "step-000001" and (out / "best").is_dir()
    run_here(["--resume", str(out), "--steps", "3", "--eval_every", "0"])
    assert (out / "best").resolve().name == "step-000001" and (out / "best").is_dir()
    state = json.loads((out / "checkpoints" / "step-000003" / "trainer.json").read_text())
    assert (state["best"], state["best_step"]) == (0.5, 1)


def test_a_best_on_other_samples_is_no_bar(checkpoint, scenes, tmp_path, reward, monkeypatch, capsys):
    out = tmp_path / "out"
    score_so(monkeypatch, 0.1, 0.5, 0.3, 0.2)
    run_here(argv_of(checkpoint, scenes, *reward, "--eval_every", "1", "--steps", "1"), out)
    run_here(["--resume", str(out), "--steps", "2", "--eval_limit", "3"])
    assert (out / "best").resolve().name == "step-000002"
    told = r"score is now that of 3 samples of test \(\w{8}\) and was that of 6 samples of test \(\w{8}\): the next"
    assert re.search(told, capsys.readouterr().out)
    run_here(["--resume", str(out), "--steps", "3"])  # the options of the last resume hold
    assert (out / "best").resolve().name == "step-000002"
    assert "score is now" not in capsys.readouterr().out


def test_a_file_of_the_same_name_and_size_elsewhere_is_another_set_and_a_moved_one_is_not():
    first, other = (Sample("1", "q", answer, (), "", False, "a/test.jsonl:1") for answer in ("red", "blue"))
    moved = replace(first, source="b/test.jsonl:1", root="/b")
    words = [describe_evaluation(RunSamples([], {"test": [sample]}, {})) for sample in (first, other, moved)]
    assert words[0] == words[2] != words[1]


def test_a_run_that_ends_before_the_new_samples_are_scored_still_names_its_best(
    checkpoint, scenes, tmp_path, reward, monkeypatch, capsys
):
    out = tmp_path / "out"
    score_so(monkeypatch, 0.1, 0.5)
    run_here(argv_of(checkpoint, scenes, *reward, "--eval_every", "1", "--steps", "1"), out)
    run_here(["--resume", str(out), "--steps", "2", "--eval_limit", "3", "--eval_every", "0"])
    assert f"best: step 1, no score yet on what is evaluated now: {out / 'best'}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sync_file", "remove_directory", "CheckpointKeeper._link_best"])
def test_a_disk_error_beside_the_save_is_a_warning(checkpoint, scenes, tmp_path, monkeypatch, capsys, name):
    def fail(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"infra.keeper.{name}", fail)
    more = ["--steps", "3", "--eval_every", "0", "--save_every", "1", "--keep_checkpoints", "1"]
    run_here(argv_of(checkpoint, scenes, *more), tmp_path / "out")
    run_here(["--resume", str(tmp_path / "out"), "--steps", "4"])
    assert "No space left on device. The run goes on" in capsys.readouterr().out
    assert (tmp_path / "out" / "checkpoints" / "step-000004" / "trainer.json").exists()


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stop_the_saves(
    checkpoint, scenes, tmp_path, monkeypatch, capsys
):
    def in_use(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(checkpoint_file.shutil, "rmtree", in_use)
    more = ["--steps", "4", "--eval_every", "0", "--save_every", "1", "--keep_checkpoints", "1"]
    run_here(argv_of(checkpoint, scenes, *more), tmp_path / "out")
    text = capsys.readouterr().out
    assert text.count("Directory not empty") == 3 and "could not be saved" not in text
    assert saved(tmp_path / "out")[-1] == "step-000004"


def test_a_directory_that_moves_keeps_its_best(checkpoint, scenes, tmp_path, monkeypatch):
    score_so(monkeypatch, 0.1, 0.5)
    run_here(argv_of(checkpoint, scenes, "--eval_every", "1", "--steps", "1"), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "best" / "config.json").is_file()


# ---- saves that fail -----------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on(
    checkpoint, scenes, tmp_path, reward, monkeypatch, capsys
):
    argv = argv_of(checkpoint, scenes, *reward, "--eval_every", "0", "--save_every", "1", "--keep_checkpoints", "9")
    full_disk(monkeypatch, (2, 3))
    run_here([*argv, "--steps", "4"], tmp_path / "out")
    assert saved(tmp_path / "out") == ["step-000001", "step-000004"]
    text = capsys.readouterr().out
    assert text.count("No space left on device") == 2 and "That is failure 2 in a row" in text
    assert f"a resume would start from {tmp_path / 'out' / 'checkpoints' / 'step-000001'}" in text
    whole = tmp_path / "whole"
    monkeypatch.undo()
    run_here([*argv, "--steps", "4"], whole)
    assert_equal(outcome(tmp_path / "out", 4), outcome(whole, 4))


def test_a_run_whose_last_save_fails_ends_with_an_error_and_the_line_that_resumes(
    checkpoint, scenes, tmp_path, reward, monkeypatch
):
    argv = argv_of(checkpoint, scenes, *reward, "--eval_every", "0", "--save_every", "1", "--steps", "2")
    full_disk(monkeypatch, (2,))
    with pytest.raises(ValueError, match=r"ends at step 2 and could not be saved.*from .*step-000001 with --resume"):
        run_here(argv, tmp_path / "out")


def test_a_save_that_is_interrupted_leaves_the_last_one_and_its_remains_go_with_the_next(
    checkpoint, scenes, tmp_path, reward, monkeypatch
):
    argv = argv_of(checkpoint, scenes, *reward, "--eval_every", "0", "--save_every", "1", "--steps", "3")
    real = checkpoint_file.save_file

    def interrupted(tensors, path):
        if "step-000002" in str(path):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        real(tensors, path)

    monkeypatch.setattr(checkpoint_file, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_here(argv, tmp_path / "out")
    assert saved(tmp_path / "out") == [".step-000002.partial", "step-000001"]
    monkeypatch.undo()
    run_here(["--resume", str(tmp_path / "out")])
    assert saved(tmp_path / "out") == ["step-000002", "step-000003"]


# ---- what a run may be resumed on ----------------------------------------------------------------------------------


def test_a_run_on_other_data_or_another_model_is_not_a_resumed_one(checkpoint, scenes, tmp_path, reward):
    out = tmp_path / "out"
    run_here(argv_of(checkpoint, scenes, *reward, "--steps", "1", "--eval_every", "0"), out)
    other = toy.model.build_model(toy.model.build_processor().tokenizer, seed=9)
    shutil.copytree(checkpoint, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="model was '[0-9a-f]{16}' in .*step-000001 and is"):
        run_here(["--resume", str(out), "--steps", "2", "--model", str(tmp_path / "other")])
    with pytest.raises(ValueError, match="num_samples was 24 in .* and is 6 now"):
        run_here(["--resume", str(out), "--steps", "2", "--data", str(scenes / "test.jsonl")])
    shutil.copytree(checkpoint, tmp_path / "moved")  # the same weights elsewhere are the same model
    run_here(["--resume", str(out), "--steps", "2", "--model", str(tmp_path / "moved")])


def run_on_a_node_without_the_weights(rank, port, argv):
    """One of two processes, the second of which has no weights files in its cache."""
    set_rank(rank, 2, port)
    if rank == 1:
        infra.run.model_fingerprint = lambda name: "0123456789abcdef"
    run_here(argv)


def test_a_resume_needs_the_weights_files_on_the_first_rank_alone(checkpoint, scenes, tmp_path, reward):
    run_here(argv_of(checkpoint, scenes, *reward, "--steps", "1", "--eval_every", "0"), tmp_path / "out")
    spawn(run_on_a_node_without_the_weights, 2, ["--resume", str(tmp_path / "out"), "--steps", "2"])
    assert saved(tmp_path / "out")[-1] == "step-000002"


def test_a_fingerprint_changes_with_the_weights_and_not_with_what_lies_beside_them(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    first = model_fingerprint(checkpoint)
    (tmp_path / "copy" / "README.md").write_text("notes")
    assert model_fingerprint(str(tmp_path / "copy")) == first
    weights = tmp_path / "copy" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1  # the last byte
    weights.write_bytes(raw)
    assert model_fingerprint(str(tmp_path / "copy")) == first  # only a sample of the bytes is read
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    assert model_fingerprint(str(tmp_path / "copy")) != first
    (tmp_path / "copy" / "model-2.safetensors").write_bytes(b"more")
    assert model_fingerprint(str(tmp_path / "copy")) not in (first, model_fingerprint(checkpoint))


def test_a_run_that_died_before_its_first_checkpoint_starts_again(checkpoint, scenes, tmp_path, reward, capsys):
    argv = argv_of(checkpoint, scenes, *reward, "--eval_every", "0", "--steps", "2")
    run_here(argv, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    run_here(["--resume", str(tmp_path / "out")])
    told = f"{tmp_path / 'out' / 'checkpoints'} holds no checkpoint yet: the run starts again\n"
    assert told in capsys.readouterr().out
    assert_equal(outcome(tmp_path / "out", 2), outcome(tmp_path / "whole", 2))
