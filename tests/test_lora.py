"""lora.py against hand arithmetic and PEFT; what is frozen; two processes against one; whole runs."""

import json
import math
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from helpers import (
    ALONE,
    CONFIG,
    adamw_steps,
    make_completions,
    make_prompts,
    only_numbers,
    relative_difference,
    run,
    step_gradients,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoTokenizer

import eval as evaluation
import sft
import train
from infra.checkpoint import load_training_state, save_checkpoint
from infra.memory import memory_estimate
from infra.options import parse_options
from infra.parallel import process_group
from infra.run import choose_trained, load_policy, make_optimizers
from model import lora
from model.lora import (
    adapted_layers,
    adapters_off,
    add_adapters,
    choose_layers,
    load_any,
    merge_adapters,
)
from model.vlm import FAMILIES, load_model, load_processor, projector_modules, trainable
from rollout import completion_logprobs

LORA = replace(CONFIG, lora_rank=4, lora_alpha=12, min_pixels=256)
NUM_ADAPTERS = 4 * (4 * (128 + 128) + 3 * (128 + 256))  # per rank: the toy's 4 layers, 4 and 3 matrices each


def adapted(checkpoint, **changes):
    """The toy with adapters that do something: B, zero at the start, is drawn."""
    model, processor = load_policy(replace(LORA, model=checkpoint, **changes), ALONE)
    shake(model)
    return model, processor


def shake(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) / 20)


def save(directory, model, checkpoint, optimizers=(), world=ALONE, **state):
    save_checkpoint(
        directory, model, list(optimizers), {"step": 0, **state}, world,
        source=checkpoint, dtype=torch.float32, pixels=(256, 65536),
    )  # fmt: skip
    return directory


@torch.no_grad()
def logits(model, processor):
    return model.eval()(**make_prompts(processor, (1,))[0]).logits


# ---- the layer -----------------------------------------------------------------------------------------------------


def small_layer(dropout=0.0):
    """W x + b with W = [[1, 2], [3, 4]], b = [10, 20]; A = [[1, 1]], B = [[1], [2]], alpha 3, rank 1."""
    holder = nn.Module()
    holder.layer = nn.Linear(2, 2)
    holder.layer.weight.data, holder.layer.bias.data = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([10.0, 20])
    add_adapters(holder, ["layer"], rank=1, alpha=3, dropout=dropout)
    holder.layer.lora_A.data, holder.layer.lora_B.data = torch.tensor([[1.0, 1]]), torch.tensor([[1.0], [2]])
    return holder


def test_an_adapter_adds_alpha_over_rank_times_b_a_x():
    holder = small_layer()
    assert holder.layer(torch.tensor([1.0, 1])).tolist() == [13 + 3 * 2, 27 + 3 * 4]
    wide = nn.Module()
    wide.layer = nn.Linear(2, 1, bias=False)
    add_adapters(wide, ["layer"], rank=4, alpha=2)
    wide.layer.weight.data.zero_()
    wide.layer.lora_A.data, wide.layer.lora_B.data = torch.ones(4, 2), torch.ones(1, 4)
    assert wide.layer(torch.tensor([1.0, 1])).tolist() == [2 / 4 * 4 * 2]


def test_dropout_acts_on_the_adapters_input_alone_and_only_in_training():
    holder = small_layer(dropout=0.5)
    x = torch.ones(64, 2)
    torch.manual_seed(0)
    trained = (holder.train().layer(x) - torch.tensor([13.0, 27])).tolist()
    # Of two ones, none, one or both are kept, and doubled: A x is 0, 2 or 4.
    assert {tuple(row) for row in trained} == {(3.0 * kept, 6.0 * kept) for kept in (0, 2, 4)}
    assert holder.eval().layer(x).unique(dim=0).tolist() == [[19, 39]]


def test_a_is_drawn_as_a_linear_layer_is_from_the_seed_and_b_is_zero(checkpoint):
    models = [load_policy(replace(LORA, model=checkpoint, seed=seed), ALONE)[0] for seed in (1, 1, 2)]
    first, same, other = (list(adapted_layers(model).values()) for model in models)
    for a, b, c in zip(first, same, other, strict=True):
        bound = 1 / math.sqrt(a.in_features)
        assert 0.9 * bound < a.lora_A.abs().max() <= bound and abs(a.lora_A.mean()) < 0.1 * bound
        assert a.lora_A.equal(b.lora_A) and not a.lora_A.equal(c.lora_A) and not a.lora_B.any()
    assert not first[0].lora_A.equal(first[1].lora_A)


# ---- which layers, and what is frozen ------------------------------------------------------------------------------


def tiny(model_type):
    text = {"num_hidden_layers": 2, **({"model_type": "qwen2"} if model_type == "internvl" else {})}
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type](text_config=text))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_adapters_go_on_every_projection_of_the_decoder_and_nowhere_else(model_type):
    experts = {"glm4v": ["gate_up_proj", "down_proj"], "qwen3_vl_moe": []}  # whose experts are no linear layers
    mlp = experts.get(model_type, ["gate_proj", "up_proj", "down_proj"])
    parts = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}" for name in mlp]
    model = tiny(model_type)
    assert choose_layers(model) == [f"model.language_model.layers.{n}.{part}" for n in (0, 1) for part in parts]
    if mlp:
        assert choose_layers(model, ["down_proj"]) == [f"model.language_model.layers.{n}.mlp.down_proj" for n in (0, 1)]
    assert choose_layers(model, [r"model\.language_model\.layers\.1\..*\.(k|v)_proj", "q_proj"]) == [
        f"model.language_model.layers.{end}" for end in
        ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj")
    ]  # fmt: skip


@pytest.mark.parametrize("target", ["quarter_proj", "lm_head", "q_pro", "visual"])
def test_a_target_that_matches_nothing_or_the_head_is_refused_with_those_there_are(target):
    with pytest.raises(ValueError, match=f"{target!r} matches no linear layer; .* down_proj, gate_proj, k_proj"):
        choose_layers(tiny("qwen2_5_vl"), ["q_proj", target])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_with_the_tower_frozen_the_projector_alone_may_be_free(model_type):
    model, tower = tiny(model_type), FAMILIES[model_type].vision_blocks
    for config in (LORA, replace(LORA, lora_rank=0, lora_alpha=0, freeze_vision=True)):
        for name in [FAMILIES[model_type].vision, *projector_modules(model)]:
            model.get_submodule(name).requires_grad_(False)
        choose_trained(model, replace(config, train_projector=True))
        names = [name for name, _ in trainable(model)]
        free = {name.split(".")[2] if "visual" in name else name.split(".")[1] for name in names}
        deep = {"merger", "deepstack_merger_list"}
        projector = {"qwen3_vl": deep, "qwen3_vl_moe": deep, "internvl": {"multi_modal_projector"},
                     "glm4v": {"merger", "downsample"}}.get(model_type, {"merger"})  # fmt: skip
        assert free - {"language_model", "weight"} == projector  # lm_head.weight
        assert not any(name.startswith(tower) for name in names)
        assert all("lora_" in name for name in names if "language_model" in name) == bool(config.lora_rank)
        model = tiny(model_type)


def test_a_frozen_tower_computes_without_autograd_and_a_free_projector_with_it(checkpoint):
    changes = {"lora_rank": 0, "lora_alpha": 0, "freeze_vision": True, "train_projector": True, "model": checkpoint}
    model, processor = load_policy(replace(LORA, **changes), ALONE)
    seen = {}
    for name in ("model.visual.blocks.0", "model.visual.blocks.1", "model.visual.merger.mlp.2"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output.requires_grad})
        )
    gradients, _, _ = step_gradients(model, None, processor, ALONE, 4096, beta=0.0)
    assert list(seen.values()) == [False, False, True]
    assert all(p.grad is None for p in model.model.visual.blocks.parameters())
    vision = {name: g for name, g in gradients.items() if "visual" in name}
    assert len(vision) == 5 and all(g.any() for g in vision.values())  # the merger's norm and two layers with bias
    assert not any("blocks" in name or "patch_embed" in name for name in gradients)


def test_adapters_in_a_tower_that_is_to_stay_frozen_are_refused(checkpoint):
    config = replace(LORA, model=checkpoint, lora_targets=[r"model\.visual\.blocks\.\d+\.attn\.qkv"])
    model, _ = load_policy(config, ALONE)
    assert list(adapted_layers(model)) == [f"model.visual.blocks.{n}.attn.qkv" for n in (0, 1)]
    with pytest.raises(ValueError, match="lora_targets mean model.visual.blocks.0.attn.qkv, which freeze_vision"):
        load_policy(replace(config, freeze_vision=True), ALONE)
    with pytest.raises(ValueError, match="lora_targets mean model.visual.merger.mlp.0, all of which train_projector"):
        load_policy(replace(config, lora_targets=[".*merger.mlp.0"], train_projector=True), ALONE)


# ---- the base is the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_with_the_adapters_off_the_model_is_its_base_bit_for_bit(checkpoint, training):
    model, processor = adapted(checkpoint, lora_dropout=0.5)
    base, _ = load_model(checkpoint)
    prompts, completions = make_prompts(processor, (1, 0)), make_completions(base, 2)
    model.train(training)
    for layer in model.model.language_model.layers:  # a base may have dropout of its own: it is off too
        layer.self_attn.attention_dropout = 0.5
    with torch.no_grad():
        with adapters_off(model):
            off = completion_logprobs(model, prompts, completions)
        on = completion_logprobs(model, prompts, completions)
        expected = completion_logprobs(base, prompts, completions)
    assert model.training == training
    for a, b, c in zip(off, on, expected, strict=True):
        assert a.equal(c) and (b - c).abs().max() > 1e-3


def length_reward(directory):
    """A reward that an untrained model earns now and then: without one nothing would move."""
    path = directory / "mine.py"
    path.write_text("def length(completion, answer):\n    return len(completion) % 5 / 4\n")
    return ["--rewards", f"{path}:length"]


def test_the_kl_penalty_is_measured_from_the_base_and_no_second_model_is_loaded(
    checkpoint, scenes, tmp_path, monkeypatch
):
    def no_reference(*arguments):
        raise AssertionError("a reference was loaded")

    monkeypatch.setattr(train, "load_reference", no_reference)
    more = [
        "--lora_rank",
        "4",
        "--steps",
        "3",
        "--eval_every",
        "0",
        "--learning_rate",
        "0.02",
        *length_reward(tmp_path),
    ]
    rows = run(checkpoint, scenes, tmp_path / "out", *more)
    assert rows[0]["kl"] == 0 and all(row["kl"] > 1e-6 for row in rows[1:])  # it starts at the base and leaves it
    assert max(row["draw_gap_max"] for row in rows) < 1e-5
    rows = run(checkpoint, scenes, tmp_path / "dropout", *more, "--lora_dropout", "0.5")
    assert rows[2]["draw_gap_max"] > 1e-3  # off in drawing, on in training


@pytest.mark.parametrize("changes", [{}, {"train_projector": True}])
def test_gradients_are_those_of_the_merged_weights_and_checkpointing_changes_nothing(checkpoint, changes):
    model, processor = adapted(checkpoint, **changes)
    found, _, _ = step_gradients(model, None, processor, ALONE, 60, beta=0.0)
    assert found.keys() == {name for name, _ in trainable(model)}
    checked, _ = adapted(checkpoint, gradient_checkpointing=True, **changes)
    assert relative_difference(step_gradients(checked, None, processor, ALONE, 60, beta=0.0)[0], found) < 1e-6

    # The chain rule by hand: W' = W + s B A, so dL/dB = s dL/dW' A^T and dL/dA = s B^T dL/dW'.
    layers = adapted_layers(model)
    factors = {name: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for name, layer in layers.items()}
    merge_adapters(model)
    whole, _, _ = step_gradients(model.requires_grad_(True), None, processor, ALONE, 4096, beta=0.0)
    expected = {}
    for name, (a, b) in factors.items():
        gradient = 12 / 4 * whole[f"{name}.weight"]
        expected |= {f"{name}.lora_A": b.T @ gradient, f"{name}.lora_B": gradient @ a.T}
    expected |= {name: whole[name] for name in found if "lora_" not in name}
    assert relative_difference(found, expected) < 1e-5


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"train_projector": True}, {"lora_targets": [r".*visual.*qkv", "v_proj"]}])
def test_peft_reads_a_checkpoint_and_gives_our_logits(checkpoint, tmp_path, changes):
    model, processor = adapted(checkpoint, lora_dropout=0.25, **changes)
    if "train_projector" in changes:
        for name in projector_modules(model):
            for parameter in model.get_submodule(name).parameters():
                parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 10
    save(tmp_path / "out", model, checkpoint)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 12, 0.25)
    assert config["base_model_name_or_path"] == checkpoint and config["modules_to_save"] == (
        ["model.visual.merger"] if "train_projector" in changes else None
    )
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    part = "visual.blocks.1.attn.qkv" if "lora_targets" in changes else "language_model.layers.3.mlp.up_proj"
    assert f"base_model.model.model.{part}.lora_A.weight" in names and all(
        n.startswith("base_model.model.") for n in names
    )

    base = AutoModelForImageTextToText.from_pretrained(checkpoint)
    plain = logits(base, processor)
    wrapped = PeftModel.from_pretrained(base, tmp_path / "out")
    assert sum("lora_A" in name for name, _ in wrapped.named_parameters()) == len(adapted_layers(model))
    ours = logits(model, processor)
    assert (ours - plain).abs().max() > 0.1 and torch.allclose(logits(wrapped, processor), ours, atol=1e-5)
    again, _ = load_any(str(tmp_path / "out"))
    assert not again.training and logits(again, processor).equal(ours)


def small(model_type):
    """A random model of the family, small enough to compute with."""
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99}  # fmt: skip
    text |= (
        {"model_type": "qwen2"}
        if model_type == "internvl"
        else {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [1, 1, 2]}}
    )
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32,
              "num_hidden_layers": 2, "num_attention_heads": 2, "deepstack_visual_indexes": [0]}  # fmt: skip
    if model_type == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](text_config=text, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_peft_and_a_merged_copy_agree_with_us_in_every_family(model_type, tmp_path):
    model, base = small(model_type), small(model_type)
    inputs = {"input_ids": torch.arange(1, 9)[None], "attention_mask": torch.ones(1, 8)}
    plain = base(**inputs).logits
    choose_trained(model, replace(LORA, train_projector=True))
    shake(model)
    for name in projector_modules(model):
        for parameter in model.get_submodule(name).parameters():
            parameter.data += 1
    lora.save_adapter(tmp_path, model, dict(trainable(model)), "base")
    ours = model(**inputs).logits
    wrapped = PeftModel.from_pretrained(base, tmp_path)
    assert (ours - plain).abs().max() > 1e-3 and torch.allclose(wrapped(**inputs).logits, ours, atol=1e-6)
    lora.load_adapter(again := small(model_type), tmp_path)
    merge_adapters(model)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert again(**inputs).logits.equal(ours) and torch.allclose(merged(**inputs).logits, ours, atol=1e-5)
    theirs = {name.replace("modules_to_save.default.", ""): p for name, p in wrapped.named_parameters()}
    for module in projector_modules(model):
        for name, parameter in model.get_submodule(module).named_parameters(module):
            others = (again.get_parameter(name), merged.get_parameter(name), theirs[f"base_model.model.{name}"])
            assert all(parameter.equal(other) for other in others), name


def test_an_adapter_that_peft_wrote_is_read_and_what_it_means_otherwise_is_refused(checkpoint, tmp_path):
    processor = load_processor(checkpoint, min_pixels=256)
    settings = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    wrapped = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(checkpoint), LoraConfig(**settings, init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "peft")
    model, _ = load_any(str(tmp_path / "peft"), min_pixels=256)
    assert torch.allclose(logits(model, processor), logits(wrapped, processor), atol=1e-5)

    path = tmp_path / "peft" / "adapter_config.json"
    saved = json.loads(path.read_text())
    for change in ({"use_rslora": True}, {"use_dora": True}, {"bias": "all"}, {"alpha_pattern": {"q_proj": 1}}):
        path.write_text(json.dumps({**saved, **change}))
        with pytest.raises(ValueError, match=f"{next(iter(change))}.*only plain LoRA"):
            load_any(str(tmp_path / "peft"))
    path.write_text(json.dumps({**saved, "r": 3}))
    with pytest.raises(ValueError, match="fits nothing in .* is that the base it was trained on"):
        load_any(str(tmp_path / "peft"))


@pytest.mark.parametrize("changes", [{}, {"train_projector": True}])
def test_merged_it_is_a_plain_model_with_the_adapters_logits(checkpoint, tmp_path, changes):
    model, processor = adapted(checkpoint, **changes)
    save(tmp_path / "step", model, checkpoint)
    lora.main(["merge", str(tmp_path / "step"), str(tmp_path / "merged")])
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert not adapted_layers(merged) and (logits(merged, processor) - logits(model, processor)).abs().max() < 1e-5
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in Path(checkpoint).iterdir()}
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").vocab_size == processor.tokenizer.vocab_size
    assert load_processor(str(tmp_path / "merged")).chat_template == processor.chat_template
    size = json.loads((tmp_path / "merged" / "processor_config.json").read_text())["image_processor"]["size"]
    assert size == {"shortest_edge": 256, "longest_edge": 65536}  # that of the training
    with pytest.raises(ValueError, match="merged exists"):
        lora.merge(str(tmp_path / "step"), str(tmp_path / "merged"))
    with pytest.raises(ValueError, match="no adapter_config.json"):
        lora.merge(checkpoint, str(tmp_path / "other"))


def test_a_merge_is_summed_in_fp32_and_saved_as_the_base_was(checkpoint, tmp_path):
    base, processor = load_model(checkpoint, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model, _ = adapted(str(tmp_path / "base"))
    save(tmp_path / "step", model, str(tmp_path / "base"))
    lora.merge(str(tmp_path / "step"), str(tmp_path / "merged"))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    name = "model.language_model.layers.2.mlp.gate_proj"
    layer = model.get_submodule(name)
    exact = layer.weight.double() + 12 / 4 * layer.lora_B.double() @ layer.lora_A.double()
    difference = merged.get_parameter(f"{name}.weight").double() - exact
    assert (difference.abs() <= 2**-8 * exact.abs() + 1e-8).all()  # rounded once: half of bf16's last place


# ---- runs ----------------------------------------------------------------------------------------------------------


def files_of(directory):
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".safetensors", ".training")
    }


@pytest.mark.parametrize(
    "more",
    [
        ["--lora_rank", "4", "--lora_dropout", "0.2", "--train_projector", "--vision_learning_rate", "1e-2"],
        ["--lora_rank", "2", "--optimizer", "muon", "--gradient_checkpointing", "--freeze_vision"],
        ["--vision_learning_rate", "1e-4", "--optimizer", "muon"],
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_interrupted(checkpoint, scenes, tmp_path, more):
    shared = ["--eval_every", "0", "--save_every", "2", "--num_iterations", "2", *length_reward(tmp_path), *more]
    whole = run(checkpoint, scenes, tmp_path / "whole", "--steps", "4", *shared)
    run(checkpoint, scenes, tmp_path / "cut", "--steps", "2", *shared)
    train.main(parse_options(train.Config, ["--resume", str(tmp_path / "cut"), "--steps", "4"], {}))
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
    with pytest.raises(ValueError, match="is a LoRA adapter: merge it first, python lora.py merge"):
        parse_options(train.Config, ["--model", str(directory), "--data", "d"], {})

    argv = ["--model", str(directory), "--data", str(scenes / "test.jsonl"), "--output", str(tmp_path / "e.json")]
    evaluation.main(parse_options(evaluation.Config, argv, {}, evaluation.run_options))
    logged = json.loads((tmp_path / "out" / "eval.jsonl").read_text().splitlines()[-1])
    summary = json.loads((tmp_path / "e.json").read_text())["summary"]["test"]
    assert {f"eval/test/{key}": value for key, value in summary.items()} | {"step": 1} == logged


def test_supervised_training_of_adapters_learns_and_can_be_merged(checkpoint, scenes, tmp_path):
    argv = ["--model", checkpoint, "--data", str(scenes / "train.jsonl"), "--eval_data", str(scenes / "test.jsonl"),
            "--template", "plain", "--output_dir", str(tmp_path / "out"), "--prompts_per_step", "8", "--min_pixels",
            "256", "--learning_rate", "1e-2", "--steps", "12", "--max_completion_tokens", "24", "--eval_every", "0",
            "--lora_rank", "8", "--lora_dropout", "0.1"]  # fmt: skip
    sft.main(parse_options(sft.Config, argv, {}))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    lora.merge(str(tmp_path / "out" / "checkpoints" / "step-000012"), str(tmp_path / "merged"))
    assert load_model(str(tmp_path / "merged"))[0].num_parameters() == load_model(checkpoint)[0].num_parameters()


def test_the_estimate_of_memory_counts_a_base_in_bf16_and_few_trained(checkpoint):
    config = replace(LORA, model=checkpoint, dtype="bf16")
    with process_group(bf16=True) as world:
        model, _ = load_policy(config, world)
        terms = memory_estimate(model, world, config, reference=False, row_tokens=8192)
        assert sum(p.numel() for _, p in trainable(model)) == 4 * NUM_ADAPTERS
    assert terms["weights, gradients, moments"] * 1e9 == 2 * 1_104_672 + 16 * 4 * NUM_ADAPTERS
    assert terms["gathered while drawing"] * 1e9 == 2 * 4 * NUM_ADAPTERS and terms["reference"] == 0


# ---- learning rates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"lora_rank": 0, "lora_alpha": 0}, {"train_projector": True}])
def test_the_vision_tower_moves_at_its_own_learning_rate(checkpoint, changes):
    config = replace(LORA, model=checkpoint, learning_rate=1e-3, vision_learning_rate=1e-5, **changes)
    model, processor = load_policy(config, ALONE)
    shake(model)
    before = {name: p.detach().clone() for name, p in trainable(model)}
    [optimizer] = make_optimizers(model, config)
    adamw_steps(model, processor, optimizer, ALONE, 1)
    for name, parameter in trainable(model):  # a first step of Adam is the rate, whatever the gradient
        rate = 1e-5 if "visual" in name else 1e-3
        assert (parameter.detach() - before[name]).abs().max() == pytest.approx(rate, rel=0.05), name


def test_a_rate_of_the_tower_holds_for_muon_and_follows_the_schedule(checkpoint):
    from infra.run import set_learning_rate

    config = replace(CONFIG, model=checkpoint, learning_rate=1e-2, vision_learning_rate=1e-4, optimizer="muon")
    model, _ = load_policy(config, ALONE)
    optimizers = make_optimizers(model, config)
    assert [[g["lr"] for g in o.param_groups] for o in optimizers] == [[1e-2, 1e-4], pytest.approx([1e-3, 1e-5])]
    for factor in (0.1, 0.5):
        assert set_learning_rate(optimizers, factor) == pytest.approx(1e-2 * factor)
    assert [g["lr"] for o in optimizers for g in o.param_groups] == pytest.approx([5e-3, 5e-5, 5e-4, 5e-6])
    grouped = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(trainable(model))


def test_a_rate_of_a_tower_that_nothing_trains_is_refused(checkpoint):
    config = replace(LORA, model=checkpoint, lora_targets=["q_proj"], vision_learning_rate=1e-4)
    with pytest.raises(ValueError, match="vision_learning_rate is 0.0001 where nothing"):
        make_optimizers(load_policy(config, ALONE)[0], config)


# ---- processes -----------------------------------------------------------------------------------------------------


def lora_policy(checkpoint, world, **changes):
    model, processor = load_policy(replace(LORA, model=checkpoint, **changes), world)
    with torch.no_grad():
        for number, layer in enumerate(adapted_layers(model).values()):
            layer.lora_B.add_(0.01 * (-1) ** number)  # every element alike, so that shards need no care
    return model, processor


def two_processes(rank, port, checkpoint, directory):
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    results = {}
    with process_group(bf16=False) as world:
        model, processor = lora_policy(checkpoint, world, train_projector=True)
        results["fp32"] = step_gradients(model, None, processor, world, 60, beta=0.0)[0]
        with adapters_off(model):
            results["off"] = score(model, processor)
        model.reshard()
        optimizers = make_optimizers(model, LORA)
        adamw_steps(model, processor, optimizers[0], world, 2)
        save(Path(directory) / "two", model, checkpoint, optimizers, world)
        results["after"] = score(model, processor)
        model.reshard()

        low, _ = lora_policy(checkpoint, world, train_projector=True, dtype="bf16")
        results["dtypes"] = {name: p.dtype for name, p in low.named_parameters()}
        results["bf16"] = step_gradients(low, None, processor, world, 4096, beta=0.0)[0]
        adamw_steps(low, processor, make_optimizers(low, LORA)[0], world, 1)

        for name, changes in {"trained": {}, "frozen": {"freeze_vision": True}}.items():
            config = replace(CONFIG, model=checkpoint, min_pixels=256, **changes)
            whole, _ = load_policy(config, world)
            logprobs = completion_logprobs(whole, make_prompts(processor, (1,)), make_completions(whole, 1))
            with CommDebugMode() as collectives:
                logprobs[0].sum().backward()
            results[name] = {str(op): count for op, count in collectives.get_comm_counts().items()}
    torch.save(results, Path(directory) / f"rank{rank}.pt")


@torch.no_grad()
def score(model, processor):
    return completion_logprobs(model, make_prompts(processor, (1, 0)), make_completions(model, 2))


@pytest.fixture(scope="module")
def double(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("lora")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(two_processes, (port, checkpoint, str(directory)), nprocs=2)
    return directory, [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_two_processes_give_the_gradients_of_one(checkpoint, double):
    model, processor = lora_policy(checkpoint, ALONE, train_projector=True)
    single = step_gradients(model, None, processor, ALONE, 4096, beta=0.0)[0]
    for results in double[1]:
        assert results["fp32"].keys() == single.keys() and relative_difference(results["fp32"], single) < 1e-6
    with adapters_off(model):
        for a, b in zip(double[1][0]["off"], score(model, processor), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_a_bf16_base_trains_fp32_adapters_in_two_processes_and_in_one(checkpoint, double):
    model, processor = lora_policy(checkpoint, ALONE, train_projector=True)
    exact = step_gradients(model, None, processor, ALONE, 4096, beta=0.0)[0]
    with process_group(bf16=True) as world:
        alone, _ = lora_policy(checkpoint, world, train_projector=True, dtype="bf16")
        assert {type(p) for name, p in alone.named_parameters() if "lora" not in name and "merger" not in name} == {
            nn.Parameter
        }  # the base is held once, not copied by FSDP
        drawn = train.sample_completions(alone, make_prompts(processor, (1,)), 2, max_new_tokens=3, eos_ids=[2])
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
            trained = "lora" in name or "merger" in name
            assert dtype == (torch.float32 if trained else torch.bfloat16), name


def test_an_adapter_saved_by_two_processes_is_read_by_one_and_training_goes_on_there(checkpoint, double):
    directory, results = double
    model, processor = load_any(str(directory / "two"), min_pixels=256)
    for a, b in zip(results[0]["after"], score(model, processor), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    policy, _ = load_policy(replace(LORA, model=checkpoint, train_projector=True, seed=9), ALONE)
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
