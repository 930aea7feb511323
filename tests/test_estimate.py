"""estimate.py: the estimate beside what FSDP really allocates, and when layers stay sharded while drawing."""

import gc
import itertools
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ALONE, CONFIG, make_model, set_rank, spawn
from torch import Tensor
from torch.distributed.tensor import DTensor

from infra.estimate import PIXELS, RowSize, memory_estimate, must_draw_sharded
from infra.optim import clip_gradients, make_optimizers
from infra.parallel import World, drawing, process_group
from infra.policy import load_policy, load_reference
from model.vlm import trainable

IMAGE = RowSize(tokens=0, prompts=1, image_tokens=CONFIG.max_pixels // PIXELS)  # the row before it is known


def two_ranks(**changes):
    return World(0, 2, torch.device("cpu"), {"shard": SimpleNamespace(size=lambda: 2)}, **changes)


def test_layers_stay_sharded_while_drawing_if_a_full_copy_does_not_fit_beside_the_rest(monkeypatch):
    model, _ = make_model()
    two = two_ranks()
    terms = memory_estimate(model, two, CONFIG, reference=True, row=IMAGE)["drawing"]
    enough = sum(terms.values()) / 0.9
    assert terms["gathered weights"] == 2 * terms["reference"] > 0
    for gigabytes, sharded in ((enough * 1.01, False), (enough * 0.99, True)):
        monkeypatch.setattr("infra.estimate.device_memory_gb", lambda device, g=gigabytes: g)
        assert must_draw_sharded(CONFIG, model, two, reference=True) == sharded
    assert not must_draw_sharded(replace(CONFIG, draw_sharded=True), model, ALONE, reference=True)
    monkeypatch.setattr("infra.estimate.device_memory_gb", lambda device: 1e6)
    assert must_draw_sharded(replace(CONFIG, draw_sharded=True), model, two, reference=True)


def test_sharded_drawing_gathers_all_but_the_layers():
    model, _ = make_model()
    terms = [
        memory_estimate(model, two_ranks(draw_sharded=sharded), CONFIG, reference=False, row=IMAGE)["drawing"]
        for sharded in (False, True)
    ]
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    saved = terms[0].pop("gathered weights") - terms[1].pop("gathered weights")
    assert saved == pytest.approx(4 * layers / 1e9) and terms[0] == terms[1]


def test_activations_grow_with_the_row_and_shrink_under_gradient_checkpointing():
    model, _ = make_model()
    text = model.config.get_text_config()

    def activations(tokens, **changes):
        config = replace(CONFIG, **changes)
        row = RowSize(tokens=tokens, prompts=1, image_tokens=0)
        return memory_estimate(model, ALONE, config, reference=False, row=row)["learning"]["activations of the row"]

    inputs = 100 * text.num_hidden_layers * text.hidden_size * 4 / 1e9  # of each layer, in fp32: the least to keep
    assert inputs <= activations(100, gradient_checkpointing=True) < activations(100)
    assert activations(200) == pytest.approx(2 * activations(100))


# ---- against real allocations ----------------------------------------------------------------------------------------


def allocated():
    """Bytes of all tensors that this process holds, once gloo's threads have let go of what they sent."""
    return min(_allocated() for _ in range(2))


def _allocated():
    time.sleep(0.2)
    gc.collect()
    tensors = [t._local_tensor if isinstance(t, DTensor) else t for t in gc.get_objects() if isinstance(t, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def weigh_run(config, world):
    """(real, estimated) bytes of each term of a run."""
    before = allocated()
    policy = load_policy(config, world)[0]
    optimizers = make_optimizers(policy, config)
    clip_gradients([parameter for _, parameter in trainable(policy)], 1.0)  # makes the gradients, of zero
    for optimizer in optimizers:
        optimizer.step()
    steady = allocated()
    terms = []
    for place in (world, replace(world, draw_sharded=True)):
        estimate = memory_estimate(policy, place, config, reference=True, row=IMAGE)
        with drawing(policy, place):
            terms.append((allocated() - steady, estimate["drawing"]["gathered weights"]))
    learning = estimate["learning"]
    terms.append((steady - before, learning["weights and moments"] + learning["gradients"]))
    if not config.lora_rank:  # with adapters the policy without them is the reference
        reference = load_reference(config, world)
        terms.append((allocated() - steady, learning["reference"]))
        del reference  # it had to be alive until here
    return [(real, gigabytes * 1e9) for real, gigabytes in terms]


def weigh(rank, port, checkpoint, directory):
    """What each kind of run really holds in two processes, beside the estimate."""
    set_rank(rank, 2, port)
    found = {}
    with process_group(bf16=True) as world:
        for dtype, lora_rank in itertools.product(("fp32", "bf16"), (0, 8)):
            config = replace(CONFIG, model=checkpoint, dtype=dtype, lora_rank=lora_rank, min_pixels=256)
            found[dtype, lora_rank] = weigh_run(config, world)
    torch.save(found, Path(directory) / f"weighed{rank}.pt")


def test_the_estimate_of_memory_is_what_fsdp_allocates(checkpoint, tmp_path):
    spawn(weigh, 2, checkpoint, str(tmp_path))
    found = torch.load(tmp_path / "weighed0.pt")
    assert {key: len(terms) for key, terms in found.items()} == {
        ("fp32", 0): 4, ("fp32", 8): 3, ("bf16", 0): 4, ("bf16", 8): 3
    }  # fmt: skip
    for key, terms in found.items():
        for real, estimate in terms:
            assert real == pytest.approx(estimate, rel=0.02), (key, terms)
