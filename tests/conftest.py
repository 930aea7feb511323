"""What several test files use: a small checkpoint on disk and a few scenes in VLM-R1's format."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.utils import logging

import toy
import toy.model
import toy.scenes

torch.set_num_threads(1)  # the suite runs beside its own worker processes; more threads only spin
logging.disable_progress_bar()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """An untrained toy as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("checkpoint")
    processor = toy.model.build_processor()
    toy.model.build_model(processor.tokenizer).save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A directory with train.jsonl (24 questions) and test.jsonl (6) and their images."""
    path = tmp_path_factory.mktemp("scenes")
    toy.scenes.write_split(path, "train", 24, seed=1)
    toy.scenes.write_split(path, "test", 6, seed=2)
    return path


LENGTH_REWARD = """
def length(completion, answer, rng):
    return len(completion) % 5 / 4 + rng.random() / 100  # random too, as a reward may be
"""


@pytest.fixture(scope="session")
def reward(tmp_path_factory):
    """A reward that an untrained model earns now and then: without one nothing would move."""
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text(LENGTH_REWARD)
    return ["--rewards", f"{path}:length"]


@pytest.fixture
def all_in_double(monkeypatch):
    """Keeps Hugging Face from casting to fp32, so that a float64 model is one throughout."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    double = SimpleNamespace(**vars(torch) | {"float32": torch.float64, "float": torch.float64})
    for modeling in (modeling_qwen3_5, modeling_qwen3_5_moe):  # whose recurrence is fp32
        monkeypatch.setattr(modeling, "torch", double)
