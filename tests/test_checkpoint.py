"""infra/checkpoint.py: what a checkpoint holds, who may read it, and checkpoints that do not fit or are not ours."""

import json
import os
import re
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ALONE, CONFIG, argv_of, run_here
from safetensors.torch import load_file, save_file

import toy.model
from infra.checkpoint import EVALUATION_FILE, Packaging, SaveFailed, load_training_state, save_checkpoint
from infra.policy import load_policy
from model.vlm import load_model

HERE = Path(__file__).parent.parent


def packaging(source):
    return Packaging(source, torch.float32, (256, 65536), {"template": "plain"})


def modes(directory):
    """The permissions of each file, as numbers."""
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


@pytest.mark.parametrize("mask, expected", [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
@pytest.mark.parametrize("lora", [False, True])
def test_files_of_a_checkpoint_have_the_permissions_that_the_umask_leaves(checkpoint, tmp_path, mask, expected, lora):
    config = replace(CONFIG, model=checkpoint, min_pixels=256, lora_rank=2 if lora else 0)
    model, _ = load_policy(config, ALONE)
    before = os.umask(mask)
    try:
        save_checkpoint(tmp_path / "step-000001", model, [], {}, ALONE, packaging(checkpoint))
        assert os.umask(mask) == mask  # saving leaves it alone
    finally:
        os.umask(before)
    found = modes(tmp_path / "step-000001")
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert {weights, "state-00000.training", "trainer.json", EVALUATION_FILE, "tokenizer.json"} <= found.keys()
    assert set(found.values()) == {expected}, found


def test_a_checkpoint_says_what_its_run_evaluates_under(saved, scenes):
    about = json.loads((saved / "checkpoints" / "step-000001" / EVALUATION_FILE).read_text())
    options = {"template": "plain", "max_completion_tokens": 6, "max_pixels": 1_003_520, "min_pixels": 256}
    assert about.items() >= {**options, "box_space": "", "eval_limit": 500, "seed": 0}.items()
    [measure] = {file["measure"] for file in about["files"].values()}
    assert about["files"].keys() == {"train", "test"} and measure.endswith("mine.py:length")


def test_weights_that_are_not_finite_never_become_a_checkpoint(checkpoint, tmp_path):
    model = toy.model.build_model(toy.model.build_processor().tokenizer)
    model.get_input_embeddings().weight.data[3, 3] = torch.nan
    with pytest.raises(SaveFailed, match="master.model.language_model.embed_tokens.weight holds values .* not finite"):
        save_checkpoint(tmp_path / "step-000001", model, [], {}, ALONE, packaging(checkpoint))
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
    save_checkpoint(tmp_path / "two", models[2], [], {"step": 1}, ALONE, packaging(checkpoint))
    with pytest.raises(ValueError, match=r"lora_A is \[2, 128\] instead of \[4, 128\]"):
        load_training_state(tmp_path / "two", models[4], [], ALONE)


def test_nothing_of_ours_unpickles(saved, tmp_path):
    ours = [path for path in (*HERE.glob("*.py"), *HERE.glob("*/*.py")) if path.parent.name != "tests"]
    assert len(ours) > 30
    for path in ours:
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
