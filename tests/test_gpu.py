"""What only a card can show, on the toy: its numbers are the CPU's, and a whole run trains, evaluates and resumes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_completions, make_prompts

import toy
from infra.budget import DeviceMemory
from model.vlm import banned_token_ids, use_own_layers
from rollout import completion_logprobs, sample_completions

HOME = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def scored(model, processor, device):
    """Log-probs of three groups, and the gradients of a weighted sum of them."""
    completions = [[ids.to(device) for ids in group] for group in make_completions(model, 3, 4)]
    values = completion_logprobs(model, make_prompts(processor, (1, 2, 0)), completions)
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(device, values[0].dtype)
    sum((group * weight[: group.shape[1]]).sum() for group in values).backward()
    return torch.cat([group.flatten() for group in values]).detach(), [p.grad for p in model.parameters()]


def models():
    """The toy's model in double precision on the CPU, and the same weights on the card in bf16."""
    processor = toy.model.build_processor()
    exact = toy.model.build_model(processor.tokenizer, seed=3).double()
    card = toy.model.build_model(processor.tokenizer, seed=3).to("cuda", torch.bfloat16)
    use_own_layers(card)
    exact.load_state_dict({name: value.double().cpu() for name, value in card.state_dict().items()})
    return processor, exact, card


def test_log_probs_and_gradients_are_those_of_the_cpu_but_for_rounding():
    processor, exact, card = models()
    expected, gradients = scored(exact, processor, "cpu")
    values, card_gradients = scored(card, processor, "cuda")
    assert (values.double().cpu() - expected).abs().mean() < 0.01 * expected.abs().mean()
    pairs = [(a.double().cpu().flatten(), b.flatten()) for a, b in zip(card_gradients, gradients, strict=True)]
    ours, theirs = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_what_is_drawn_is_scored_alike():
    processor, _, card = models()
    prompts = make_prompts(processor, (1, 2, 0))
    options = {"max_new_tokens": 40, "eos_ids": [10, 11], "banned_ids": banned_token_ids(card, processor)}
    drawn, logprobs = sample_completions(card, prompts, 4, return_logprobs=True, **options)
    scored_again = completion_logprobs(card, prompts, drawn, banned_ids=options["banned_ids"])
    gaps = [
        (a - b[: len(a)]).abs().mean()
        for group, values in zip(logprobs, scored_again, strict=True)
        for a, b in zip(group, values, strict=True)
    ]
    assert torch.stack(gaps).mean() < 0.02


def test_the_memory_that_rows_are_chosen_by_is_the_allocators():
    memory = DeviceMemory(torch.device("cuda"))
    memory.reset()
    before = memory.held()
    block = torch.empty(2**26, device="cuda")
    assert memory.held() - before == block.nbytes <= memory.peak()
    assert 0 < memory.limit() <= torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize("options", [[], ["--lora_rank", "8"], ["--gradient_checkpointing", "--beta", "0.04"]], ids=str)
def test_the_toy_trains_evaluates_and_resumes(tmp_path, options):
    shared = ["--prompts_per_step", "4", "--eval_every", "2", "--eval_limit", "8", "--save_every", "2"]
    command = [sys.executable, "train.py", "--steps", "2", "--output_dir", str(tmp_path / "run"), *shared, *options]
    first = subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "without CUDA graphs" not in first.stdout + first.stderr
    again = [sys.executable, "train.py", "--resume", str(tmp_path / "run"), "--steps", "3"]
    resumed = subprocess.run(again, cwd=HOME, capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["draw_gap"] < 0.05 and row["memory_gb"] > 0 for row in rows)
