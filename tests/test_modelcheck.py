"""modelcheck.py: what is missing or damaged in a model directory is told by file; what is whole passes."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infra.modelcheck import check_model


@pytest.fixture
def model(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def sharded(model):
    """The same with its weights in two files and an index."""
    (model / "model.safetensors").unlink()
    files = {"one": "model-00001-of-00002.safetensors", "two": "model-00002-of-00002.safetensors"}
    for tensor, name in files.items():
        save_file({tensor: torch.zeros(3)}, model / name)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return model


@pytest.fixture
def adapter(model, tmp_path):
    """An adapter on the model, in a directory of its own."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    save_file({"lora_A": torch.zeros(2)}, directory / "adapter_model.safetensors")
    return directory


def refused(path, message):
    """Whether the check refuses a path with one line that begins so."""
    with pytest.raises(ValueError) as error:
        check_model(str(path))
    text = str(error.value)
    assert text.startswith(message) and "\n" not in text, text


# ---- what passes ---------------------------------------------------------------------------------------------------


def test_a_whole_model_and_an_adapter_pass(model, adapter):
    check_model(str(model))
    check_model(str(adapter))
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    check_model(str(adapter))  # whose base is on the hub


def test_a_model_in_shards_passes(sharded):
    check_model(str(sharded))


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-3B-Instruct", "gpt2", "OpenGVLab/InternVL3-1B-hf", "_a/b.c"])
def test_a_name_that_may_be_on_the_hub_passes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_model(name)


def test_a_processor_in_the_hubs_layout_passes(model):
    (model / "processor_config.json").rename(model / "preprocessor_config.json")
    (model / "tokenizer.json").rename(model / "vocab.json")
    check_model(str(model))


def test_weights_without_tensors_or_with_metadata_alone_pass(model):
    save_file({}, model / "model.safetensors", metadata={"format": "pt"})
    check_model(str(model))


# ---- paths that are no model directory -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no/such/model", "/no/such", "./model", "../model", "a/b/c", "two words"])
def test_a_path_that_does_not_exist_and_is_no_name_of_the_hub_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(name, f"model {name}: no such directory")


def test_a_missing_directory_beside_others_is_no_name_of_the_hub(model, monkeypatch):
    monkeypatch.chdir(model.parent.parent)
    refused(f"{model.parent.name}/modle", f"model {model.parent.name}/modle: no such directory")


def test_the_message_for_a_windows_path_says_how_to_write_it():
    refused("C:\\models\\qwen", "model C:\\models\\qwen: no such directory; write the path with / instead of \\")


def test_a_file_is_refused(model):
    path = model / "model.safetensors"
    refused(path, f"model {path} is a file: a directory with config.json and *.safetensors is expected")


def test_a_link_to_nothing_is_refused_with_its_target(tmp_path):
    (tmp_path / "best").symlink_to("checkpoints/step-000100")
    refused(tmp_path / "best", f"model {tmp_path / 'best'} is a link to checkpoints/step-000100, which does not exist")


def test_the_best_checkpoint_of_a_run_that_has_none_is_refused_with_where_the_others_are(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    refused(
        tmp_path / "best",
        f"model {tmp_path / 'best'}: no such directory; nothing has beaten the start of that run yet: give one of "
        f"{tmp_path / 'checkpoints'}",
    )


def test_the_directory_of_a_run_is_refused_and_its_checkpoint_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"options": {"model": "m"}}))
    refused(tmp_path, f"model {tmp_path} is the directory of a run: give one of its checkpoints, as {tmp_path}/best")


# ---- files that are missing or damaged -----------------------------------------------------------------------------


def test_a_directory_without_config_json_is_refused_with_what_it_holds(tmp_path):
    refused(tmp_path, f"model {tmp_path}: it has no config.json; it is empty")
    (tmp_path / "notes.txt").touch()
    refused(tmp_path, f"model {tmp_path}: it has no config.json; it holds notes.txt")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is damaged: Expecting value"),
        (b'{"model_type": ', "is damaged: Expecting value"),
        (b"[]", "is damaged: a JSON object is expected"),
        (b"\xff\xfe{}", "is damaged: 'utf-8' codec can't decode"),
        (b"{}", "names no model_type"),
        (b'{"model_type": ""}', "names no model_type"),
    ],
)
def test_a_config_that_is_damaged_or_names_no_model_type_is_refused(model, content, reason):
    (model / "config.json").write_bytes(content)
    refused(model, f"{model / 'config.json'} {reason}")


@pytest.mark.parametrize(
    "name, kind, names",
    [
        ("tokenizer.json", "tokenizer", "tokenizer.json, vocab.json, tokenizer.model"),
        ("processor_config.json", "processor", "preprocessor_config.json, processor_config.json"),
    ],
)
def test_a_model_without_tokenizer_or_processor_is_refused(model, name, kind, names):
    (model / name).unlink()
    refused(model, f"model {model}: it has no {kind}; one of {names} is expected")


def test_a_model_without_weights_is_refused_with_what_it_holds(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"it has no weights \(\*\.safetensors\).*it holds chat_template.jinja, conf"):
        check_model(str(model))


def test_a_model_with_pickled_weights_alone_is_told_to_convert_them(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"^model {re.escape(str(model))}: .*ickled.*\\*\\.bin.* convert them"):
        check_model(str(model))


def test_a_shard_that_the_index_names_and_nobody_downloaded_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, f"{sharded / 'model-00002-of-00002.safetensors'} is missing: copy or download the model again")


def test_a_damaged_index_is_named(sharded):
    (sharded / "model.safetensors.index.json").write_text("{")
    refused(sharded, f"{sharded / 'model.safetensors.index.json'} is damaged: ")


def test_a_damaged_shard_is_named(sharded):
    path = sharded / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    refused(sharded, f"{path} is cut off: ")


def test_weights_that_are_cut_off_are_refused_with_both_sizes(model):
    path = model / "model.safetensors"
    size = path.stat().st_size
    for left in (size - 1, size // 2):
        os.truncate(path, left)
        refused(model, f"{path} is cut off: {left:,} of {size:,} bytes; copy or download it again")
    with open(path, "wb") as file:
        file.truncate(size + 1)  # a file of zeros: as a download leaves it that reserves the space first
    refused(model, f"{path} is damaged: its header is no JSON")


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_weights_without_a_whole_header_are_refused(model, size):
    path = model / "model.safetensors"
    os.truncate(path, size)
    refused(model, f"{path} is damaged: {size} bytes without a whole header; copy or download it again")


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff\xff"])
def test_weights_whose_header_is_something_else_are_refused(model, header):
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(model, f"{path} is damaged: its header is no JSON")


# ---- adapters ------------------------------------------------------------------------------------------------------


def test_an_adapter_whose_base_is_gone_is_refused_with_the_base(model, adapter):
    shutil.rmtree(model)
    refused(adapter, f"model {model}: no such directory")


def test_an_adapter_that_names_no_base_is_refused(adapter):
    (adapter / "adapter_config.json").write_text("{}")
    refused(adapter, f"{adapter / 'adapter_config.json'} names no base_model_name_or_path")


def test_a_base_and_an_adapter_are_checked_file_by_file(model, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, f"{adapter / 'adapter_model.safetensors'} is missing")
    (model / "tokenizer.json").unlink()
    refused(adapter, f"model {model}: it has no tokenizer")


def test_the_check_imports_neither_torch_nor_transformers(model):
    code = "import sys; from infra.modelcheck import check_model; check_model(sys.argv[1]); print(*sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], cwd=root, capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "safetensors", "numpy"} & {*done.stdout.split()}
