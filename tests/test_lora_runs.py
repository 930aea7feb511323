"""Training with adapters: whole runs, resumed and evaluated, and two processes against one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    ALONE,
    CONFIG,
    adamw_steps,
    make_completions,
    make_prompts,
    only_numbers,
    relative_difference,
    run,
    run_here,
    set_rank,
    spawn,
    step_gradients,
)
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

import eval as evaluation
import sft
from infra import run as run_file
from infra.checkpoint import Packaging, load_training_state, save_checkpoint
from infra.config import EvalConfig, SftConfig
from infra.estimate import RowSize, memory_estimate
from infra.optim import make_optimizers
from infra.options import parse_options
from infra.parallel import process_group
from infra.policy import load_policy
from model.lora import adapted_layers, adapters_off
from model.vlm import load_any, load_model, trainable
from rollout import completion_logprobs, sample_completions
from tools.merge import merge

LORA = replace(CONFIG, lora_rank=4, lora_alpha=12, min_pixels=256)
NUM_ADAPTERS = 4 * (4 * (128 + 128) + 3 * (128 + 256))  # per rank: the toy's 4 layers, 4 and 3 matrices each


def save(directory, model, checkpoint, optimizers, world):
    packaging = Packaging(checkpoint, torch.float32, (256, 65536), {})
    save_checkpoint(directory, model, list(optimizers), {"step": 0}, world, packaging)


# ---- one process ---------------------------------------------------------------------------------------------------


def test_the_kl_penalty_is_measured_from_the_base_and_no_second_model_is_loaded(
    checkpoint, scenes, reward, tmp_path, monkeypatch
):
    def no_reference(*arguments):
        raise AssertionError("a reference was loaded")

    monkeypatch.setattr(run_file, "load_reference", no_reference)
    more = ["--lora_rank", "4", "--steps", "3", "--eval_every", "0", "--learning_rate", "0.02", *reward]
    rows = run(checkpoint, scenes, tmp_path / "out", *more)
    assert rows[0]["kl"] == 0 and all(row["kl"] > 1e-6 for row in rows[1:])  # it starts at the base and leaves it
    assert max(row["draw_gap_max"] for row in rows) < 1e-5
    rows = run(checkpoint, scenes, tmp_path / "dropout", *more, "--lora_dropout", "0.5")
    assert rows[2]["draw_gap_max"] > 1e-3  # off in drawing, on in training


def files_of(directory):
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".safetensors", ".training")
    }


@pytest.mark.parametrize(
    "more",
    [
        ["--lora_rank", "4", "--lora_dropout", "0.2", "--lora_targets", "q_proj", "down_proj"],
        ["--lora_rank", "2", "--optimizer", "muon", "--gradient_checkpointing", "--freeze_vision"],
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_interrupted(checkpoint, scenes, reward, tmp_path, more):
    shared = ["--eval_every", "0", "--save_every", "2", "--num_iterations", "2", *reward, *more]
    whole = run(checkpoint, scenes, tmp_path / "whole", "--steps", "4", *shared)
    run(checkpoint, scenes, tmp_path / "cut", "--steps", "2", *shared)
    run_here(["--resume", str(tmp_path / "cut"), "--steps", "4"])
    cut = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert only_numbers(cut) == only_numbers(whole) and whole[-1]["grad_norm"] > 0
    one, other = (files_of(tmp_path / name / "checkpoints" / "step-000004") for name in ("whole", "cut"))
    assert one == other and len(one) == 2
    assert one != files_of(tmp_path / "whole" / "checkpoints" / "step-000002")


def test_a_checkpoint_holds_the_adapter_its_tokenizer_and_the_state_of_what_is_trained(checkpoint, scenes, tmp_path):
    run(checkpoint, scenes, tmp_path / "out", "--lora_rank", "4", "--steps", "1", "--eval_every", "1")
    directory = tmp_path / "out" / "checkpoints" / "step-000001"
    names = {path.name for path in directory.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "trainer.json", "tokenizer.json"} <= names
    assert {"processor_config.json", "chat_template.jinja"} <= names and "model.safetensors" not in names
    with safe_open(directory / "state-00000.training", "pt") as file:
        masters = [name for name in file.keys() if name.startswith("master.")]
    assert len(masters) == 2 * 28 and all(".lora_" in name for name in masters)

    argv = ["--model", str(directory), "--data", str(scenes / "test.jsonl"), "--output", str(tmp_path / "e.json")]
    evaluation.main(parse_options(EvalConfig, argv))
    logged = json.loads((tmp_path / "out" / "eval.jsonl").read_text().splitlines()[-1])
    summary = json.loads((tmp_path / "e.json").read_text())["summary"]["test"]
    assert {f"eval/test/{key}": value for key, value in summary.items()} | {"step": 1} == logged


def test_supervised_training_of_adapters_learns_and_can_be_merged(checkpoint, scenes, tmp_path):
    argv = ["--model", checkpoint, "--data", str(scenes / "train.jsonl"), "--eval_data", str(scenes / "test.jsonl"),
            "--template", "plain", "--output_dir", str(tmp_path / "out"), "--prompts_per_step", "8", "--min_pixels",
            "256", "--learning_rate", "1e-2", "--steps", "12", "--max_completion_tokens", "24", "--eval_every", "0",
            "--lora_rank", "8", "--lora_dropout", "0.1"]  # fmt: skip
    sft.main(parse_options(SftConfig, argv))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    merge(str(tmp_path / "out" / "checkpoints" / "step-000012"), str(tmp_path / "merged"))
    assert load_model(str(tmp_path / "merged"))[0].num_parameters() == load_model(checkpoint)[0].num_parameters()


def test_the_estimate_of_memory_counts_a_base_in_bf16_and_few_trained(checkpoint):
    config = replace(LORA, model=checkpoint, dtype="bf16")
    with process_group(bf16=True) as world:
        model, _ = load_policy(config, world)
        row = RowSize(tokens=8192, prompts=1, image_tokens=100)
        memory = memory_estimate(model, world, config, reference=False, row=row)
        assert sum(p.numel() for _, p in trainable(model)) == 4 * NUM_ADAPTERS
    drawing, learning = memory["drawing"], memory["learning"]
    assert learning["weights and moments"] * 1e9 == 2 * 1_104_672 + 12 * 4 * NUM_ADAPTERS
    assert learning["gradients"] * 1e9 == 4 * 4 * NUM_ADAPTERS and learning["activations of its images"] == 0
    assert drawing["gathered weights"] * 1e9 == 2 * 4 * NUM_ADAPTERS and drawing["reference"] == 0


# ---- two processes -------------------------------------------------------------------------------------------------


def lora_policy(checkpoint, world, **changes):
    model, processor = load_policy(replace(LORA, model=checkpoint, **changes), world)
    with torch.no_grad():
        for number, layer in enumerate(adapted_layers(model).values()):
            layer.lora_B.add_(0.01 * (-1) ** number)  # every element alike, so that shards need no care
    return model, processor


def two_processes(rank, port, checkpoint, directory):
    set_rank(rank, 2, port)
    results = {}
    with process_group(bf16=False) as world:
        model, processor = lora_policy(checkpoint, world)
        results["fp32"] = step_gradients(model, None, processor, world, 60, beta=0.0)[0]
        with adapters_off(model):
            results["off"] = score(model, processor)
        model.reshard()
        optimizers = make_optimizers(model, LORA)
        adamw_steps(model, processor, optimizers[0], world, 2)
        save(Path(directory) / "two", model, checkpoint, optimizers, world)
        results["after"] = score(model, processor)
        model.reshard()

        low, _ = lora_policy(checkpoint, world, dtype="bf16")
        results["dtypes"] = {name: p.dtype for name, p in low.named_parameters()}
        results["bf16"] = step_gradients(low, None, processor, world, 4096, beta=0.0)[0]
        adamw_steps(low, processor, make_optimizers(low, LORA)[0], world, 1)

        for name, changes in {"trained": {}, "frozen": {"freeze_vision": True}}.items():
            config = replace(CONFIG, model=checkpoint, min_pixels=256, **changes)
            whole, _ = load_policy(config, world)
            with CommDebugMode() as collectives:  # from the forward on: the backward calls modules that it has to know
                logprobs = completion_logprobs(whole, make_prompts(processor, (1,)), make_completions(whole, 1))
                before = dict(collectives.get_comm_counts())
                logprobs[0].sum().backward()
            counts = collectives.get_comm_counts()
            results[name] = {str(op): count - before.get(op, 0) for op, count in counts.items()}
    torch.save(results, Path(directory) / f"rank{rank}.pt")


@torch.no_grad()
def score(model, processor):
    return completion_logprobs(model, make_prompts(processor, (1, 0)), make_completions(model, 2))


@pytest.fixture(scope="module")
def double(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora")
    spawn(two_processes, 2, checkpoint, str(directory))
    return directory, [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_two_processes_give_the_gradients_of_one(checkpoint, double):
    model, processor = lora_policy(checkpoint, ALONE)
    single = step_gradients(model, None, processor, ALONE, 4096, beta=0.0)[0]
    for results in double[1]:
        assert results["fp32"].keys() == single.keys() and relative_difference(results["fp32"], single) < 1e-6
    with adapters_off(model):
        for a, b in zip(double[1][0]["off"], score(model, processor), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_a_bf16_base_trains_fp32_adapters_in_two_processes_and_in_one(checkpoint, double):
    model, processor = lora_policy(checkpoint, ALONE)
    exact = step_gradients(model, None, processor, ALONE, 4096, beta=0.0)[0]
    with process_group(bf16=True) as world:
        alone, _ = lora_policy(checkpoint, world, dtype="bf16")
        frozen = {type(p) for name, p in alone.named_parameters() if "lora" not in name}
        assert frozen == {nn.Parameter}  # the base is held once, not copied by FSDP
        drawn = sample_completions(alone, make_prompts(processor, (1,)), 2, max_new_tokens=3, eos_ids=[2])
        found = [step_gradients(alone, None, processor, world, 4096, beta=0.0)[0]]
        dtypes = {name: p.dtype for name, p in alone.named_parameters()}
        save(double[0] / "low", alone, checkpoint, [], world)
    assert len(drawn[0]) == 2
    with safe_open(double[0] / "low" / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}
    for gradients in [*found, *(results["bf16"] for results in double[1])]:
        assert all(g.dtype == torch.float32 for g in gradients.values())
        assert 1e-5 < relative_difference(gradients, exact) < 0.1
    for types in (dtypes, double[1][0]["dtypes"]):
        for name, dtype in types.items():
            assert dtype == (torch.float32 if "lora" in name else torch.bfloat16), name


def test_an_adapter_saved_by_two_processes_is_read_by_one_and_training_goes_on_there(checkpoint, double):
    directory, results = double
    model, processor = load_any(str(directory / "two"), min_pixels=256)
    for a, b in zip(results[0]["after"], score(model, processor), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    policy, _ = load_policy(replace(LORA, model=checkpoint, seed=9), ALONE)
    load_training_state(directory / "two", policy, make_optimizers(policy, LORA), ALONE)
    for a, b in zip(score(policy, processor), score(model, processor), strict=True):
        assert a.equal(b)


def test_a_frozen_tower_is_not_gathered_for_the_backward(double):
    for results in double[1]:
        counts = [
            {op.rpartition(".")[2]: count for op, count in results[name].items()} for name in ("trained", "frozen")
        ]
        gathers = [sum(count for op, count in part.items() if "gather" in op) for part in counts]
        assert gathers == [4 + 2, 4]  # decoder layers and vision blocks; the root is there already
