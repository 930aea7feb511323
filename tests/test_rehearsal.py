"""A step of the tiny model on a GPU that is not there: dtypes, devices, waits of the host, memory; and its tools."""

import multiprocessing
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from tools.costs import Memory, bytes_of, flops_of, kernels_of
from tools.fakecuda import CUDA, FakeCuda
from tools.rehearse import Case, draw, learn, peaks, rehearsal, repeated_flops

pytestmark = pytest.mark.skipif(
    not (torch.version.cuda or shutil.which("g++")), reason="a torch without CUDA needs g++ to pretend one"
)
PRODUCTS = ("mm.default", "addmm.default", "_scaled_dot_product_flash_attention.default")


def local(tensor):
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class Dtypes:
    """Watches the dtypes that products read, and those that products with fp32 sums return."""

    def __init__(self):
        self.read, self.summed = set(), set()

    def __call__(self, function, args, kwargs, result):
        if function.__name__ in PRODUCTS:
            self.read |= {leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        if function.__name__ in ("mm.dtype", "bmm.dtype"):
            self.read |= {args[0].dtype, args[1].dtype}
            self.summed.add(result.dtype)


def rehearse(options):
    """What a step of this case tells."""
    with rehearsal(Case("tiny", **{"row_tokens": 100, **options})) as run:
        dtypes, held = Dtypes(), run.meter.memory.total
        run.meter.mode.observers.append(dtypes)
        repeated = repeated_flops(run)
        token = draw(run)
        learn(run)
        masters = {local(p).dtype for p in run.policy.parameters() if p.requires_grad}
        moments = {local(s).dtype for o in run.optimizers for s in tree_leaves(list(o.state.values()))}
        left = run.meter.memory.total - held
        return SimpleNamespace(
            parts=run.meter.parts, token=token, repeated=repeated, dtypes=dtypes, masters=masters, moments=moments,
            held=held, left=left, peaks=peaks(run),
        )  # fmt: skip


@pytest.fixture(scope="module")
def fresh():
    """A process of its own. Autograd counts the devices when it first runs, and in this process it may have run."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def rehearsed(fresh):
    return cache(lambda **options: fresh.submit(rehearse, options).result())


def by_function(places):
    """The waits by file and function, without lines and without those of transformers."""
    found = Counter()
    for place, count in places.items():
        if not place.startswith("transformers/"):
            file, function = place.split(" ")
            found[f"{file.split(':')[0]} {function}"] += count
    return found


# ---- the step ------------------------------------------------------------------------------------------------------


def test_masters_and_moments_are_fp32_products_bf16_and_logits_fp32(rehearsed):
    step = rehearsed()
    assert step.masters == step.moments == {torch.float32}
    assert step.dtypes.read == {torch.bfloat16} and step.dtypes.summed == {torch.float32}


def test_a_step_asks_the_host_for_values_in_these_places_only(rehearsed):
    parts = rehearsed().parts
    assert by_function(parts["score"].syncs) == {"infra/rows.py _row": 2, "train.py groups_that_teach": 1}
    assert by_function(parts["learn"].syncs) == {"infra/optim.py clip_gradients": 1, "train.py train_step": 1}
    assert by_function(parts["figures"].syncs) == {
        "infra/rows.py on_host": 1,  # all completions at once
        "train.py rollout_figures": 1,
        "train.py learning_figures": 1,
    }


@pytest.mark.parametrize("options", [{}, {"gpus": 8}, {"lora_rank": 8}])
def test_drawing_a_token_waits_for_nothing(rehearsed, options):
    token = rehearsed(**options).token
    assert not token.syncs and not token.copies and token.kernels > 100


def test_adapters_run_with_checkpointing_and_the_tower_only_before_the_step(rehearsed):
    step = rehearsed(lora_rank=8, gradient_checkpointing=True)
    assert step.masters == {torch.float32} and step.dtypes.read == {torch.bfloat16}
    whole = rehearsed()
    assert step.held < whole.held / 3  # a base in bf16, no moments, and no second model as the reference
    assert step.parts["learn"].flops < whole.parts["learn"].flops
    assert any("get_vision" in place for place in whole.parts["learn"].syncs)
    assert not any("get_vision" in place for place in step.parts["learn"].syncs)


def test_checkpointing_holds_less_and_computes_more(rehearsed):
    kept, again = rehearsed().parts["learn"], rehearsed(gradient_checkpointing=True).parts["learn"]
    assert again.peak < kept.peak and again.flops > 1.1 * kept.flops


def test_eight_ranks_share_the_weights(rehearsed):
    alone, shared = rehearsed(), rehearsed(gpus=8)
    assert shared.masters == {torch.float32} and shared.dtypes.read == {torch.bfloat16}
    assert alone.held / 8 < shared.held < alone.held / 7
    assert by_function(shared.parts["learn"].syncs)["infra/parallel.py _reduce"] == 2


def test_a_step_gives_back_what_it_takes(rehearsed):
    for options in ({}, {"gpus": 8}, {"lora_rank": 8, "gradient_checkpointing": True}):
        assert rehearsed(**options).left < 0.02 * rehearsed(**options).held


@pytest.mark.parametrize(
    "options", [{"row_tokens": 200}, {"row_tokens": 200, "gpus": 8}, {"gradient_checkpointing": True}]
)
def test_the_estimate_of_memory_is_what_a_step_holds(rehearsed, options):
    # LoRA is left to the true sizes, by hand: here the logits, of which the estimate takes the most, are half of it.
    for phase, (tracked, estimated) in rehearsed(**options).peaks.items():
        assert estimated == pytest.approx(tracked, rel=0.05), phase


def test_a_packed_row_takes_fewer_operations_than_repeated_rows(rehearsed):
    assert rehearsed().repeated > 1.5 * rehearsed().parts["learn"].flops


# ---- the pretended GPU ---------------------------------------------------------------------------------------------


def test_a_cpu_tensor_beside_a_cuda_tensor_raises():
    with FakeCuda(), pytest.raises(RuntimeError, match="two devices"):
        torch.ones(3, device=CUDA) + torch.ones(3)


def test_reads_of_values_are_counted_and_true():
    with FakeCuda() as mode:
        lengths = torch.tensor([3, 1, 2], device=CUDA)
        assert (lengths * 2).tolist() == [6, 2, 4] and int(lengths.sum()) == 6 and (lengths > 1).cpu().tolist() == [
            True, False, True
        ]  # fmt: skip
        assert lengths.repeat_interleave(lengths).shape == (6,) and lengths[lengths > 1].shape == (2,)
        assert mode.syncs.total() == 5 and mode.copies.total() == 1
        assert {place.split(" ")[1] for place in mode.syncs} == {"test_reads_of_values_are_counted_and_true"}


def test_what_nobody_knows_reads_as_one_and_shapes_nothing():
    with FakeCuda() as mode:
        drawn = torch.rand(4, device=CUDA)
        zeros = torch.zeros(4, device=CUDA)
        view = zeros[1:]
        zeros.copy_(drawn)  # overwrites the view, too
        assert drawn.tolist() == view.tolist() + [1.0] == [1.0] * 4
        with pytest.raises(RuntimeError, match="nobody knows"):
            drawn.nonzero()
        mode.know(drawn, 0.5)
        assert len(drawn.nonzero()) == 4


def test_pinned_memory_is_copied_without_a_wait():
    with FakeCuda() as mode:
        torch.ones(3).pin_memory().to(CUDA, non_blocking=True)
        assert not mode.copies and not mode.syncs
        torch.ones(3).to(CUDA)
        assert mode.copies.total() == 1


def differentiate_on_both_devices():
    with FakeCuda():
        x = torch.ones(3, device=CUDA, requires_grad=True)
        (x * x + x).sum().backward()
        assert x.grad.is_cuda and x.grad.shape == (3,)
    x = torch.ones(3, requires_grad=True)
    (x * x + x).sum().backward()
    return x.grad.tolist()


def test_afterwards_torch_is_as_before(fresh):
    assert fresh.submit(differentiate_on_both_devices).result() == [3.0] * 3
    functions = torch.cuda.synchronize, torch.nn.functional.scaled_dot_product_attention
    with FakeCuda():
        assert torch.cuda.synchronize is not functions[0]
    assert functions == (torch.cuda.synchronize, torch.nn.functional.scaled_dot_product_attention)


# ---- costs ---------------------------------------------------------------------------------------------------------


def test_costs_of_an_operator_by_hand():
    costs = []

    def watch(function, args, kwargs, result):
        costs.append(
            (function.__name__, kernels_of(function, args, result), flops_of(function, args, kwargs, result),
             bytes_of(function, args, kwargs, result))
        )  # fmt: skip

    with FakeCuda() as mode:
        a, b = torch.ones(2, 3, device=CUDA), torch.ones(3, 4, device=CUDA)
        mode.observers.append(watch)
        a @ b
        b.view(12)
        a[:1].expand(5, 3) + 1
    assert costs == [
        ("mm.default", 1, 2 * 2 * 3 * 4, 4 * (6 + 12 + 8)),
        ("view.default", 0, 0, 2 * 4 * 12),
        ("slice.Tensor", 0, 0, 4 * (6 + 3)),
        ("expand.default", 0, 0, 2 * 4 * 3),
        ("add.Tensor", 1, 0, 4 * (3 + 15)),
    ]


def test_memory_counts_what_is_alive_in_blocks_of_512_bytes():
    memory = Memory()
    with FakeCuda() as mode, memory.resized():
        mode.observers.append(memory)
        first = torch.zeros(1000, device=CUDA)
        view = first[:10]
        second = torch.zeros(1, device=CUDA)
        assert memory.total == 4096 + 512
        del first
        assert memory.total == 4096 + 512  # the view holds it
        del view
        assert memory.total == 512 and memory.peak == 4096 + 512
        second.untyped_storage().resize_(0)
        assert memory.total == 0
