"""A gated MLP that keeps less computes what the modelling file's does, and takes no product more."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

import toy
from model.lora import add_adapters
from model.mlp import lean_mlp, use_lean_mlps


def make_mlp(units, bias=True):
    torch.manual_seed(0)
    mlp = Qwen2_5_VLMLP(Qwen2_5_VLVisionConfig(hidden_size=16, intermediate_size=units), bias=bias).double()
    return mlp, torch.randn(5, 16, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("units", [24, 20])  # 20 is padded to 24
def test_outputs_and_gradients_are_the_modelling_files(units, bias):
    mlp, states = make_mlp(units, bias)
    outs = [lean_mlp(mlp, states), mlp(states)]
    assert_close(*outs, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(out.square().sum(), [states, *mlp.parameters()]) for out in outs]
    assert_close(*gradients, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert_close(lean_mlp(mlp, states), mlp(states), rtol=0, atol=1e-14)


@pytest.mark.parametrize("units", [24, 20])
def test_adapters_count_also_where_the_width_would_be_padded(units):
    mlp, states = make_mlp(units)
    add_adapters(mlp, ["gate_proj", "up_proj", "down_proj"], rank=2, alpha=4)
    for name, parameter in mlp.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    outs = [lean_mlp(mlp, states), mlp(states)]
    assert_close(*outs, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(out.square().sum(), list(mlp.parameters())) for out in outs]
    assert_close(*gradients, rtol=0, atol=1e-6)


def kept_and_computed(function, states):
    """The shapes of the tensors that the backward pass keeps, and the operations of both passes."""
    shapes = []
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
            out = function(states)
        out.sum().backward()
    return shapes, counter.get_total_flops()


def test_of_the_hidden_tensors_gate_and_up_are_kept_and_no_product_is_repeated():
    mlp, states = make_mlp(24, bias=False)
    lean, flops = kept_and_computed(lambda states: lean_mlp(mlp, states), states)
    plain, expected = kept_and_computed(mlp, states)
    assert plain.count((5, 24)) == 4 and lean.count((5, 24)) == 2
    assert flops == expected


def test_a_models_gated_mlps_are_found():
    model = toy.model.build_model(toy.model.build_processor().tokenizer)
    use_lean_mlps(model)
    lean = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert len(lean) == len(model.model.language_model.layers) + len(model.model.visual.blocks)
