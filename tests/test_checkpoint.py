"""checkpoint.py: saves that fail, and checkpoints that do not fit or are not ours."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ALONE, CONFIG, argv_of, assert_equal, full_disk, outcome, run_here
from safetensors.torch import load_file, save_file

import toy
import toy.model
from infra import checkpoint as checkpoint_file
from infra.checkpoint import SaveFailed, load_training_state, save_checkpoint
from infra.run import load_policy
from model.vlm import load_model

HERE = Path(__file__).parent.parent


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on(
    checkpoint, scenes, tmp_path, reward, monkeypatch, capsys
):
    argv = argv_of(checkpoint, scenes, *reward, "--eval_every", "0", "--save_every", "1", "--keep_checkpoints", "9")
    full_disk(monkeypatch, (2, 3))
    run_here([*argv, "--steps", "4"], tmp_path / "out")
    saved = {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert saved == {"step-000001", "step-000004"}
    text = capsys.readouterr().out
    assert text.count("No space left on device") == 2 and "2 save(s) in a row have failed" in text
    assert f"{tmp_path / 'out' / 'checkpoints' / 'step-000001'} is what it could be resumed from" in text
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
    directory = tmp_path / "out" / "checkpoints"
    assert {path.name for path in directory.iterdir()} == {"step-000001", ".step-000002.partial"}
    monkeypatch.undo()
    run_here(["--resume", str(tmp_path / "out")])
    assert {path.name for path in directory.iterdir()} == {"step-000002", "step-000003"}


def test_weights_that_are_not_finite_never_become_a_checkpoint(checkpoint, tmp_path):
    model = toy.model.build_model(toy.model.build_processor().tokenizer)
    model.get_input_embeddings().weight.data[3, 3] = torch.nan
    options = {"source": checkpoint, "dtype": torch.float32, "pixels": (256, 65536)}
    with pytest.raises(SaveFailed, match="master.model.language_model.embed_tokens.weight holds values .* not finite"):
        save_checkpoint(tmp_path / "step-000001", model, [], {}, ALONE, **options)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(checkpoint, scenes, tmp_path_factory, reward):
    """A run of one step, saved."""
    out = tmp_path_factory.mktemp("saved") / "out"
    run_here(argv_of(checkpoint, scenes, *reward, "--steps", "1", "--eval_every", "0"), out)
    return out


def rewrite(change):
    """Damage that changes the tensors of the training state."""

    def damage(directory):
        path = directory / "state-00000.training"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


NORM = "model.language_model.norm.weight"


DAMAGE = {
    "a missing tensor": (rewrite(lambda t: t.pop(f"master.{NORM}")), f"master.{NORM} is missing"),
    "a missing moment": (rewrite(lambda t: t.pop(f"moment.exp_avg:{NORM}")), f"moment.exp_avg:{NORM} is missing"),
    "a wrong shape": (
        rewrite(lambda t: t.update({f"master.{NORM}": torch.zeros(7)})),
        rf"master.{NORM} is \[7\] instead of \[128\]",
    ),
    "a foreign tensor": (
        rewrite(lambda t: t.update(master_x=torch.zeros(1))),
        "master_x belongs to nothing trained here",
    ),
    "a truncated file": (
        lambda d: os.truncate(d / "state-00000.training", 1000),
        r"state-00000.training is missing or cut off",
    ),
    "a missing file": (lambda d: (d / "state-00000.training").unlink(), "state-00000.training is missing or cut off"),
    "a half written JSON": (lambda d: (d / "trainer.json").write_text('{"step": 1'), "trainer.json is damaged"),
    "two shards announced": (
        lambda d: (d / "trainer.json").write_text(
            json.dumps(json.loads((d / "trainer.json").read_text()) | {"num_shards": 2})
        ),
        "state-00001.training is missing or cut off",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_names(saved, tmp_path, damage):
    shutil.copytree(saved, tmp_path / "out", symlinks=True)
    change, reason = DAMAGE[damage]
    change(tmp_path / "out" / "checkpoints" / "step-000001")
    with pytest.raises(ValueError, match=reason):
        run_here(["--resume", str(tmp_path / "out"), "--steps", "2"])


def test_adapters_of_another_rank_are_refused_with_their_shapes(checkpoint, tmp_path):
    models = {}
    for rank in (2, 4):
        config = replace(CONFIG, model=checkpoint, min_pixels=256, lora_rank=rank)
        models[rank] = load_policy(config, ALONE)[0]
    options = {"source": checkpoint, "dtype": torch.float32, "pixels": (256, 65536)}
    save_checkpoint(tmp_path / "two", models[2], [], {"step": 1}, ALONE, **options)
    with pytest.raises(ValueError, match=r"lora_A is \[2, 128\] instead of \[4, 128\]"):
        load_training_state(tmp_path / "two", models[4], [], ALONE)


def test_nothing_of_ours_unpickles(saved, tmp_path):
    for path in [*HERE.glob("*.py"), *HERE.glob("[imt]*/*.py")]:
        text = path.read_text()
        assert not re.search(r"torch\.load|import pickle|pickle\.|weights_only|marshal|shelve|joblib", text), path
    bomb = b"\x80\x04cposix\nsystem\n(X\x10\x00\x00\x00touch " + str(tmp_path / "x")[-10:].encode() + b"tR."
    shutil.copytree(saved, tmp_path / "out", symlinks=True)
    directory = tmp_path / "out" / "checkpoints" / "step-000001"
    for name in ("optimizer.pt", "state-00000.pt", "pytorch_model.bin", "training_args.bin"):
        (directory / name).write_bytes(bomb)
    run_here(["--resume", str(tmp_path / "out"), "--steps", "2"])  # beside ours they are not opened
    (directory / "model.safetensors").unlink()  # and in place of ours they are refused
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(directory))
