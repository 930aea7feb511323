"""lora.py against hand arithmetic and PEFT: the layer, the layers chosen, the base as the reference, files."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import ALONE, CONFIG, make_completions, make_prompts, relative_difference, step_gradients
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from infra.checkpoint import Packaging, save_checkpoint
from infra.policy import load_policy
from model import lora
from model.lora import adapted_layers, adapters_off, add_adapters, choose_layers, merge_adapters
from model.vlm import FAMILIES, load_any, load_model, trainable
from rollout import completion_logprobs

LORA = replace(CONFIG, lora_rank=4, lora_alpha=12, min_pixels=256)


def adapted(checkpoint, **changes):
    """The toy with adapters that do something: B, zero at the start, is drawn."""
    model, processor = load_policy(replace(LORA, model=checkpoint, **changes), ALONE)
    shake(model)
    return model, processor


def shake(model):
    generator = torch.Generator().manual_seed(5)
    for layer in adapted_layers(model).values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) / 20)


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


def test_merged_the_layer_is_a_plain_one_with_the_sum_as_its_weight():
    holder = small_layer()
    merge_adapters(holder)
    assert type(holder.layer) is nn.Linear and holder.layer.weight.tolist() == [[1 + 3, 2 + 3], [3 + 6, 4 + 6]]
    assert [name for name, _ in holder.named_parameters()] == ["layer.weight", "layer.bias"]


def test_a_merge_rounds_once():
    holder = nn.Module()
    holder.layer = nn.Linear(1, 1, bias=False).bfloat16()
    add_adapters(holder, ["layer"], rank=1, alpha=1)
    holder.layer.weight.data.fill_(1)
    holder.layer.lora_A.data.fill_(1)
    holder.layer.lora_B.data.fill_(2**-8 + 2**-17)  # just above half of bf16's last place at 1; rounded first, half
    merge_adapters(holder)
    assert holder.layer.weight.item() == 1 + 2**-7


def test_a_is_drawn_as_a_linear_layer_is_from_the_seed_and_b_is_zero(checkpoint):
    models = [load_policy(replace(LORA, model=checkpoint, seed=seed), ALONE)[0] for seed in (1, 1, 2)]
    first, same, other = (list(adapted_layers(model).values()) for model in models)
    for a, b, c in zip(first, same, other, strict=True):
        bound = 1 / math.sqrt(a.in_features)
        assert 0.9 * bound < a.lora_A.abs().max() <= bound and abs(a.lora_A.mean()) < 0.1 * bound
        assert a.lora_A.equal(b.lora_A) and not a.lora_A.equal(c.lora_A) and not a.lora_B.any()
    assert not first[0].lora_A.equal(first[1].lora_A)


def test_without_an_alpha_adapters_are_scaled_by_two_and_nothing_else_is_trained(checkpoint):
    model, _ = load_policy(replace(LORA, model=checkpoint, lora_alpha=0), ALONE)
    assert {layer.lora_scale for layer in adapted_layers(model).values()} == {2.0}
    names = [name for name, _ in trainable(model)]
    assert len(names) == 2 * len(adapted_layers(model)) and all(name.endswith(("lora_A", "lora_B")) for name in names)


# ---- which layers --------------------------------------------------------------------------------------------------


HYBRID = {"layer_types": ["linear_attention", "full_attention"]}  # Qwen3.5
TEXTS = {"internvl": {"model_type": "qwen2"}, "qwen3_5": HYBRID, "qwen3_5_moe": HYBRID}
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
LINEAR = [f"linear_attn.{name}" for name in ("out_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERT = [*(f"shared_expert.{name}" for name in MLP), "shared_expert_gate"]
# The linear layers of the first and of the second MLP where they are not those above; other experts are none.
MLPS = {
    "glm4v": (["gate_up_proj", "down_proj"],) * 2,
    "glm46v": (["gate_up_proj", "down_proj"],) * 2,
    "glm4v_moe": (MLP, [f"shared_experts.{name}" for name in MLP]),
    "qwen3_vl_moe": ([], []),
    "qwen3_5_moe": (EXPERT, EXPERT),
}


def tiny(model_type):
    text = {"num_hidden_layers": 2, **TEXTS.get(model_type, {})}
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type](text_config=text))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_adapters_go_on_every_projection_of_the_decoder_and_nowhere_else(model_type):
    first = LINEAR if TEXTS.get(model_type) == HYBRID else ATTENTION
    parts = [
        f"model.language_model.layers.{number}.{part}"
        for number, (mixer, mlp) in enumerate(zip((first, ATTENTION), MLPS.get(model_type, (MLP, MLP)), strict=True))
        for part in (*mixer, *(f"mlp.{name}" for name in mlp))
    ]
    model = tiny(model_type)
    assert choose_layers(model) == parts
    for targets in (["v_proj", "q_proj"], ["down_proj"], ["in_proj_qkv", "in_proj_a"]):
        named = [part for part in parts if part.endswith(tuple(f".{target}" for target in targets))]
        if named:
            assert choose_layers(model, targets) == named


def test_a_target_is_a_whole_name_and_a_plain_language_models_decoder_is_found():
    layer = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("up_proj", "gate_up_proj")})
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([layer]), "embed": nn.Linear(2, 2), "visual": nn.ModuleList([layer])}
    )
    holder = nn.ModuleDict({"model": model, "lm_head": nn.Linear(2, 2)})
    assert choose_layers(holder, ["up_proj"]) == ["model.layers.0.up_proj"]
    assert choose_layers(holder) == ["model.layers.0.up_proj", "model.layers.0.gate_up_proj"]


@pytest.mark.parametrize(
    "target", ["quarter_proj", "lm_head", "q_pro", "visual", "qkv", "self_attn.q_proj", ".*q_proj", "proj", ""]
)
def test_a_target_that_is_no_layers_name_is_refused_with_those_there_are(target):
    with pytest.raises(ValueError) as error:
        choose_layers(tiny("qwen2_5_vl"), ["q_proj", target])
    assert str(error.value) == (
        f"lora_targets: {target!r} is no linear layer of the decoder; choose from down_proj, gate_proj, k_proj, "
        "o_proj, q_proj, up_proj, v_proj"
    )


# ---- the base is the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_with_the_adapters_off_the_model_is_its_base_bit_for_bit(checkpoint, training):
    model, processor = adapted(checkpoint, lora_dropout=0.5)
    base, _ = load_model(checkpoint)
    prompts, completions = make_prompts(processor, (1, 0)), make_completions(base, 2)
    for layer in model.model.language_model.layers:  # a base may have dropout of its own: it is off too
        layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.Dropout(0.5))
    model.train(training)
    with torch.no_grad():
        with adapters_off(model):
            off = completion_logprobs(model, prompts, completions)
        on = completion_logprobs(model, prompts, completions)
        expected = completion_logprobs(base, prompts, completions)
    assert model.training == training
    for a, b, c in zip(off, on, expected, strict=True):
        assert a.equal(c) and (b - c).abs().max() > 1e-3


def test_after_an_error_the_adapters_are_on_again_and_a_model_without_any_keeps_its_mode():
    holder = small_layer().train()
    with pytest.raises(KeyError), adapters_off(holder):
        assert not holder.training and not holder.layer.lora_on
        raise KeyError
    assert holder.training and holder.layer.lora_on
    with adapters_off(plain := nn.Linear(2, 2).train()):
        assert plain.training


def test_gradients_are_those_of_the_merged_weights_and_checkpointing_changes_nothing(checkpoint):
    model, processor = adapted(checkpoint)
    found, _, _ = step_gradients(model, None, processor, ALONE, 60, beta=0.0)
    assert found.keys() == {name for name, _ in trainable(model)}
    checked, _ = adapted(checkpoint, gradient_checkpointing=True)
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
    assert relative_difference(found, expected) < 1e-5


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"lora_targets": ["up_proj", "v_proj"]}])
def test_peft_reads_a_checkpoint_and_gives_our_logits(checkpoint, tmp_path, changes):
    model, processor = adapted(checkpoint, lora_dropout=0.25, **changes)
    packaging = Packaging(checkpoint, torch.float32, (256, 65536), {})
    save_checkpoint(tmp_path / "out", model, [], {"step": 0}, ALONE, packaging)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 12, 0.25)
    assert config["base_model_name_or_path"] == checkpoint
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "base_model.model.model.language_model.layers.3.mlp.up_proj.lora_A.weight" in names
    assert len(names) == 2 * len(adapted_layers(model)) and all(n.startswith("base_model.model.") for n in names)

    base = AutoModelForImageTextToText.from_pretrained(checkpoint)
    plain = logits(base, processor)
    wrapped = PeftModel.from_pretrained(base, tmp_path / "out")
    assert sum("lora_A" in name for name, _ in wrapped.named_parameters()) == len(adapted_layers(model))
    ours = logits(model, processor)
    assert (ours - plain).abs().max() > 0.1 and torch.allclose(logits(wrapped, processor), ours, atol=1e-5)
    again, _ = load_any(str(tmp_path / "out"))
    assert not again.training and logits(again, processor).equal(ours)
    assert {layer.lora_dropout for layer in adapted_layers(again).values()} == {0.25}


def test_an_adapter_names_its_base_by_the_full_path_or_by_its_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    for base, named in (("base", str(tmp_path / "base")), ("owner/base", "owner/base")):
        lora.save_adapter(tmp_path, small_layer(), {}, base)
        assert lora.base_of(str(tmp_path)) == named


def small(model_type):
    """A random model of the family, small enough to compute with."""
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99}  # fmt: skip
    text |= TEXTS.get(model_type, {})
    if model_type != "internvl":
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [1, 1, 2],
                                   "partial_rotary_factor": 1.0}  # fmt: skip
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
    # PEFT takes every gate_proj, up_proj and down_proj of this type for those of experts, and drops their adapters.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if model_type == "glm4v_moe" else []
    add_adapters(model.requires_grad_(False), choose_layers(model, targets), rank=4, alpha=12)
    shake(model)
    lora.save_adapter(tmp_path, model, dict(trainable(model)), "base")
    ours = model(**inputs).logits
    wrapped = PeftModel.from_pretrained(base, tmp_path)
    assert (ours - plain).abs().max() > 1e-3 and torch.allclose(wrapped(**inputs).logits, ours, atol=1e-6)
    lora.load_adapter(again := small(model_type), tmp_path)
    merge_adapters(model)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert again(**inputs).logits.equal(ours) and torch.allclose(merged(**inputs).logits, ours, atol=1e-5)


@pytest.fixture
def by_peft(checkpoint, tmp_path):
    """An adapter that PEFT wrote, and the model that it was written from."""
    settings = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_pretrained(checkpoint)
    wrapped = get_peft_model(base, LoraConfig(**settings, init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft", wrapped


def test_an_adapter_that_peft_wrote_is_read(checkpoint, by_peft):
    directory, wrapped = by_peft
    model, processor = load_any(str(directory), min_pixels=256)
    assert torch.allclose(logits(model, processor), logits(wrapped, processor), atol=1e-5)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"use_rslora": True}, "LORA adapter with use_rslora: only plain LoRA"),
        ({"use_dora": True}, "LORA adapter with use_dora: only plain LoRA"),
        ({"bias": "all"}, "LORA adapter with bias: only plain LoRA"),
        ({"alpha_pattern": {"q_proj": 1}}, "LORA adapter with alpha_pattern: only plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "LORA adapter with modules_to_save: only plain LoRA"),
        ({"peft_type": "LOHA"}, "LOHA adapter"),
        ({"r": 3}, r"down_proj.lora_A.weight \[2, 256\] fits nothing in .* is that the base it was trained on"),
    ],
)
def test_an_adapter_that_means_something_else_is_refused_with_the_setting(by_peft, change, reason):
    path = by_peft[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"^{by_peft[0]}: .*{reason}"):
        load_any(str(by_peft[0]))


def test_an_adapter_of_layers_that_the_base_does_not_have_is_refused(by_peft):
    with pytest.raises(ValueError, match=r"down_proj is no linear layer of the base"):
        lora.load_adapter(nn.Module(), by_peft[0])
