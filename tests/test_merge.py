"""tools/merge.py: base and adapter become one model that plain transformers loads, with all files of the checkpoint."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ALONE, CONFIG, make_prompts
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoTokenizer

from infra.checkpoint import Packaging, save_checkpoint
from infra.modelcheck import check_model
from infra.policy import load_policy
from model.lora import adapted_layers
from model.vlm import load_model, load_processor
from tools.merge import main, merge

NAME = "model.language_model.layers.2.mlp.gate_proj"


def save_adapter_on(base, directory):
    """A checkpoint of an adapter that does something, its model and its processor."""
    config = replace(CONFIG, model=base, lora_rank=4, lora_alpha=12, min_pixels=256)
    model, processor = load_policy(config, ALONE)
    generator = torch.Generator().manual_seed(5)
    for layer in adapted_layers(model).values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) / 20)
    packaging = Packaging(base, torch.float32, (256, 65536), {"template": "plain"})
    save_checkpoint(directory, model, [], {"step": 0}, ALONE, packaging)
    return model, processor


@torch.no_grad()
def logits(model, processor):
    return model.eval()(**make_prompts(processor, (1,))[0]).logits


@pytest.fixture
def step(checkpoint, tmp_path):
    """A checkpoint of a LoRA run."""
    save_adapter_on(checkpoint, tmp_path / "step")
    return tmp_path / "step"


def test_merged_it_is_a_plain_model_with_the_adapters_logits(checkpoint, tmp_path):
    model, processor = save_adapter_on(checkpoint, tmp_path / "step")
    merge(str(tmp_path / "step"), str(tmp_path / "merged"))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint)
    ours = logits(model, processor)
    assert not adapted_layers(merged) and (logits(merged, processor) - ours).abs().max() < 1e-5
    assert (logits(plain, processor) - ours).abs().max() > 0.1
    check_model(str(tmp_path / "merged"))


def test_a_merged_directory_holds_what_its_base_does_and_the_pixels_and_settings_of_its_run(checkpoint, step, tmp_path):
    merge(str(step), str(tmp_path / "merged"))
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in Path(checkpoint).iterdir()} | {"evaluation.json"}
    processor = load_processor(checkpoint)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").vocab_size == processor.tokenizer.vocab_size
    assert load_processor(str(tmp_path / "merged")).chat_template == processor.chat_template
    size = json.loads((tmp_path / "merged" / "processor_config.json").read_text())["image_processor"]["size"]
    assert size == {"shortest_edge": 256, "longest_edge": 65536}
    assert json.loads((tmp_path / "merged" / "evaluation.json").read_text()) == {"template": "plain"}


def test_an_adapter_from_elsewhere_gets_the_tokenizer_and_processor_files_of_its_base(checkpoint, tmp_path):
    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = get_peft_model(AutoModelForImageTextToText.from_pretrained(checkpoint), settings)
    wrapped.save_pretrained(tmp_path / "peft")
    for name in ("optimizer.pt", "trainer_state.json", "tokenizer_config.json"):  # as a trainer leaves them beside it
        (tmp_path / "peft" / name).write_text("{}")
    merge(str(tmp_path / "peft"), str(tmp_path / "merged"))
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in Path(checkpoint).iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (Path(checkpoint) / name).read_bytes()
    merged, processor = load_model(str(tmp_path / "merged"))
    assert torch.allclose(logits(merged, processor), logits(wrapped, processor), atol=1e-5)


def test_a_merge_is_summed_in_fp32_and_saved_as_the_base_was(checkpoint, tmp_path):
    base, processor = load_model(checkpoint, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model, _ = save_adapter_on(str(tmp_path / "base"), tmp_path / "step")
    merge(str(tmp_path / "step"), str(tmp_path / "merged"))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    layer = model.get_submodule(NAME)
    exact = layer.weight.double() + 12 / 4 * layer.lora_B.double() @ layer.lora_A.double()
    difference = merged.get_parameter(f"{NAME}.weight").double() - exact
    assert (difference.abs() <= 2**-8 * exact.abs() + 1e-8).all()  # rounded once: half of bf16's last place


@pytest.mark.parametrize("mask, expected", [(0o022, 0o644), (0o077, 0o600)])
def test_all_files_have_the_permissions_of_any_new_file(step, tmp_path, mask, expected):
    (step / "tokenizer.json").chmod(0o400)
    before = os.umask(mask)
    try:
        merge(str(step), str(tmp_path / "merged"))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()} == {expected}


def test_a_merge_that_fails_leaves_nothing_under_its_name_and_the_next_one_clears_up(step, tmp_path, monkeypatch):
    with monkeypatch.context() as patches:
        patches.setattr("tools.merge.copy_files", lambda model, directory: (directory / "left").touch() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge(str(step), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    merge(str(step), str(tmp_path / "merged"))
    assert not (tmp_path / "merged" / "left").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"step", "merged"}


def test_the_command_says_what_it_did_or_what_is_wrong_in_one_line(checkpoint, step, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main([str(step), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: base and adapter in one model\n"
    (step / "adapter_model.safetensors").rename(tmp_path / "weights")
    (tmp_path / "file").touch()
    mistakes = {
        (): "usage: python -m tools.merge CHECKPOINT OUT",
        (str(step), str(out), "more"): "usage: python -m tools.merge CHECKPOINT OUT",
        (str(step), str(out)): f"error: {out} exists: name a directory that does not",
        (checkpoint, str(tmp_path / "other")): (
            f"error: {checkpoint} has no adapter_config.json: give a checkpoint of a LoRA run, OUT/checkpoints/step-..."
        ),
        (str(step), str(tmp_path / "other")): (
            f"error: {step / 'adapter_model.safetensors'} is missing: copy or download the model again"
        ),
    }
    for argv, line in mistakes.items():
        assert main(list(argv)) == 2
        assert capsys.readouterr().err == f"{line}\n"
    (tmp_path / "weights").rename(step / "adapter_model.safetensors")
    assert main([str(step), str(tmp_path / "file" / "below")]) == 2
    assert capsys.readouterr().err.startswith("error: [Errno 20] Not a directory")
    assert not (tmp_path / "other").exists()
