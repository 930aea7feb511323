"""parallel.py and the exactness of a step: two processes against one, any cut into rows, images on one rank only."""

import atexit
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ALONE,
    CONFIG,
    Recorder,
    adamw_steps,
    full,
    learn,
    make_completions,
    make_model,
    make_prompts,
    make_rollout,
    make_run,
    relative_difference,
    set_rank,
    spawn,
    step_gradients,
)
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

import train
from infra.checkpoint import SIDE_FILES, Packaging, _row_range, copy_side_files, load_training_state, save_checkpoint
from infra.optim import make_optimizers
from infra.parallel import all_gather, all_max, all_sum, drawing, gathered, process_group, shard_model
from infra.policy import load_policy, load_reference
from model import vlm
from rollout import completion_logprobs, sample_completions, see_images

MUON = replace(CONFIG, optimizer="muon", learning_rate=1e-2)


def packaging(source, dtype=torch.float32):
    return Packaging(str(source), dtype, (256, 65536), {})


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)


def frozen_gradients(world, row_tokens, *, seen_once):
    """Gradients of a step with a frozen tower; `seen_once`: its images are seen before, as train.draw does."""
    model, processor = make_model()
    model.model.visual.requires_grad_(False)
    model = shard_model(model, world, compute_dtype=torch.float32)
    recorder, rollout = Recorder(model), make_rollout(model, processor, world)
    run = make_run(model, processor, world, [recorder], beta=0.0, row_tokens=row_tokens)
    if seen_once:
        with gathered(model):
            prompts = [replace(prompt, inputs=see_images(model, prompt)) for prompt in rollout.prompts]
            run.blank = replace(run.blank, inputs=see_images(model, run.blank))
        rollout = replace(rollout, prompts=prompts)
    learn(run, rollout)
    return recorder.gradients


def reward_error(world):
    """The message of the error that this rank raises if only rank 1 has a reward that fails."""
    run = SimpleNamespace(world=world, config=CONFIG)
    with pytest.raises(ValueError) as error:
        train.handle_reward_errors(run, ["sample 7: reward mine raised", "another"] if world.rank == 1 else [])
    return str(error.value)


def two_processes(rank, port, directory):
    """Everything that needs two ranks, in one job, since starting one takes seconds; results go to files."""
    set_rank(rank, 2, port)
    directory = Path(directory)
    with process_group(bf16=False) as world:
        results = {
            "sum": all_sum({"a": 1.0 + rank, "b": 2.0}, world),
            "max": all_max({"a": 1.0 + rank, "b": -rank}, world),
            "rows": all_gather([rank, rank], world),
            "reward_error": reward_error(world),
        }
        model, processor = make_model()
        model = shard_model(model, world, compute_dtype=torch.float32)
        reference = make_model(seed=4)[0].requires_grad_(False)
        reference = shard_model(reference, world, compute_dtype=torch.float32, trained=False)
        results["sharded"] = all(isinstance(p, DTensor) for p in model.parameters())
        for row_tokens in (60, 150, 4096):
            results[row_tokens] = step_gradients(model, reference, processor, world, row_tokens)
        nodes = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))  # two nodes of one process
        replica = shard_model(make_model()[0], replace(world, mesh=nodes), compute_dtype=torch.float32)
        results["replicated"] = step_gradients(replica, reference, processor, replace(world, mesh=nodes), 4096)
        results["frozen"] = frozen_gradients(world, 60, seen_once=True)
        results |= draws_of_two(model, processor, world)
        results["after_draw"] = step_gradients(model, reference, processor, world, 4096)
        with torch.no_grad():
            completion_logprobs(model, make_prompts(processor, (1,)), make_completions(model, 1))
        results["freed"] = layers_are_sharded(model)
        model.reshard()  # the root waits for a backward that does not come
        results |= training_of_two(model, processor, world, directory)
    torch.save(results, directory / f"rank{rank}.pt")


def layers_are_sharded(model):
    return all(isinstance(parameter, DTensor) for parameter in model.model.language_model.layers.parameters())


def draws_of_two(model, processor, world):
    """What two ranks draw from a full copy and from layers that stay sharded: more prompts and steps on the second."""
    prompts = make_prompts(processor, (1, 0, 2, 0))[: 2 + world.rank]
    results = {}
    for name, place in (("drawn", world), ("drawn_in_lockstep", replace(world, draw_sharded=True))):
        with drawing(model, place) as forward:  # with a full copy no collective may run in here
            results[f"{name}_from_shards"] = layers_are_sharded(model)
            drawn = sample_completions(
                model, prompts, 1, max_new_tokens=5 + 3 * world.rank, eos_ids=[2], temperature=0, forward=forward
            )
        results[name] = all_gather([[ids.tolist() for [ids] in drawn]], world)
    return results


def training_of_two(model, processor, world, directory):
    """The weights after steps on two ranks; writes a checkpoint and continues the one of a single process."""
    optimizer, results = adamw(model), {}
    adamw_steps(model, processor, optimizer, world, 2)
    if world.first:
        processor.save_pretrained(directory / "source")
    state = {"step": 2, "best": 0.5}
    save_checkpoint(directory / "two", model, [optimizer], state, world, packaging(directory / "source"))
    adamw_steps(model, processor, optimizer, world, 1)
    results["trained"] = {name: full(p) for name, p in model.named_parameters()}

    muon = shard_model(make_model(seed=7)[0], world, compute_dtype=torch.float32)
    for optimizer in make_optimizers(muon, MUON):
        adamw_steps(muon, processor, optimizer, world, 1)
    results["muon"] = {name: full(p) for name, p in muon.named_parameters()}

    # Two processes continue a checkpoint of one as the one process would.
    other = shard_model(make_model(seed=9)[0], world, compute_dtype=torch.float32)
    optimizer = adamw(other)
    load_training_state(directory / "one", other, [optimizer], world)
    adamw_steps(other, processor, optimizer, world, 1)
    results["from_one"] = {name: full(p) for name, p in other.named_parameters()}
    return results


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The same computations in this process alone; writes the checkpoint that two processes read."""
    directory = tmp_path_factory.mktemp("parallel")
    model, processor = make_model()
    reference = make_model(seed=4)[0].requires_grad_(False)
    results = {"directory": directory, "processor": processor}
    for row_tokens in (60, 150, 4096):
        results[row_tokens] = step_gradients(model, reference, processor, ALONE, row_tokens)
    drawn = sample_completions(
        model, make_prompts(processor, (1, 0, 2, 0)), 1, max_new_tokens=8, eos_ids=[2], temperature=0
    )
    results["drawn"] = [ids.tolist() for [ids] in drawn]
    optimizer = adamw(model)
    adamw_steps(model, processor, optimizer, ALONE, 2)
    processor.save_pretrained(directory / "source")
    state = {"step": 2, "best": None}
    save_checkpoint(directory / "one", model, [optimizer], state, ALONE, packaging(directory / "source"))
    results["saved"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    adamw_steps(model, processor, optimizer, ALONE, 1)
    results["trained"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    muon, _ = make_model(seed=7)
    for optimizer in make_optimizers(muon, MUON):
        adamw_steps(muon, processor, optimizer, ALONE, 1)
    results["muon"] = {name: p.detach().clone() for name, p in muon.named_parameters()}
    return results


def four_processes(rank, port, checkpoint, directory):
    """Two nodes of two, as torchrun would describe them; only the first rank of all reads the checkpoint."""
    set_rank(rank, 4, port, per_node=2)
    loaded, real = [], AutoModelForImageTextToText.from_pretrained
    vlm.AutoModelForImageTextToText.from_pretrained = lambda *a, **o: loaded.append(rank) or real(*a, **o)
    results = {}
    with process_group(bf16=False, shard_within_node=True) as world:
        config = replace(CONFIG, model=checkpoint, min_pixels=256)
        policy, processor = load_policy(config, world)
        reference = load_reference(config, world)
        results["loaded"], results["mesh"] = loaded, (world.mesh.mesh_dim_names, tuple(world.mesh.shape))
        results["gradients"] = step_gradients(policy, reference, processor, world, 60)[0]
        results["eos"] = policy.generation_config.eos_token_id
        with gathered(policy):
            drawn = sample_completions(
                policy, make_prompts(processor, (1, 0)), 1, max_new_tokens=4 + rank, eos_ids=[], temperature=0
            )
        results["drawn"] = [ids.tolist() for [ids] in drawn]
        state = {"step": 1, "best": None}
        save_checkpoint(Path(directory) / "four", policy, [], state, world, packaging(checkpoint))
    torch.save(results, Path(directory) / f"node{rank}.pt")


def test_two_nodes_of_two_train_and_draw_as_one_process_and_one_rank_reads_the_checkpoint(checkpoint, tmp_path):
    spawn(four_processes, 4, checkpoint, str(tmp_path))
    nodes = [torch.load(tmp_path / f"node{rank}.pt", weights_only=False) for rank in range(4)]
    config = replace(CONFIG, model=checkpoint, min_pixels=256)
    policy, processor = load_policy(config, ALONE)
    gradients = step_gradients(policy, load_reference(config, ALONE), processor, ALONE, 4096)[0]
    drawn = sample_completions(policy, make_prompts(processor, (1, 0)), 1, max_new_tokens=7, eos_ids=[], temperature=0)
    for rank, results in enumerate(nodes):
        assert results["mesh"] == (("replicate", "shard"), (2, 2))
        assert results["loaded"] == ([0, 0] if rank == 0 else [])  # policy and reference
        assert relative_difference(results["gradients"], gradients) < 1e-6
        assert results["drawn"] == [ids[: 4 + rank].tolist() for [ids] in drawn]
        assert results["eos"] == policy.generation_config.eos_token_id
    files = sorted(path.name for path in (tmp_path / "four").glob("*.training"))
    assert files == ["state-00000.training", "state-00001.training"]  # of the first node
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "four").state_dict()
    assert all(saved[name].equal(value) for name, value in policy.state_dict().items())


@pytest.fixture(scope="module")
def double(single):
    spawn(two_processes, 2, str(single["directory"]))
    return [torch.load(single["directory"] / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


class Held:
    """Writes when it goes: at the latest when the interpreter is taken apart."""

    def __init__(self, path):
        self.path = path

    def __del__(self):
        self.path.write_text("taken apart")


def hold_and_end(rank, port, out):
    sys.modules["held"] = Held(out / "held")
    atexit.register((out / "told").write_text, "told")
    print("printed", end="")


def test_a_process_of_several_ends_without_taking_the_interpreter_apart(tmp_path, capfd):
    spawn(hold_and_end, 1, tmp_path)
    assert (tmp_path / "told").exists() and not (tmp_path / "held").exists()
    assert capfd.readouterr().out == "printed"


def test_figures_and_rows_of_all_ranks_come_together(double):
    for results in double:
        assert results["sum"] == {"a": 3.0, "b": 4.0} and results["max"] == {"a": 2.0, "b": 0.0}
        assert results["rows"] == [0, 0, 1, 1] and results["sharded"]


@pytest.mark.parametrize("row_tokens", [60, 150])
def test_gradients_do_not_depend_on_how_a_step_is_cut_into_rows(single, row_tokens):
    assert single[row_tokens][2] > single[4096][2] == 1
    assert relative_difference(single[row_tokens][0], single[4096][0]) < 1e-6


@pytest.mark.parametrize("row_tokens", [60, 150, 4096])
def test_two_processes_give_the_gradients_of_one_with_images_on_one_rank_only(single, double, row_tokens):
    for results in double:
        assert relative_difference(results[row_tokens][0], single[4096][0]) < 1e-6
        assert results[row_tokens][2] == double[0][row_tokens][2]


def test_a_frozen_tower_that_sees_its_images_once_leaves_the_gradients_as_they_are(double):
    expected = frozen_gradients(ALONE, 4096, seen_once=False)
    assert not any("visual" in name for name in expected)
    for results in double:
        assert relative_difference(results["frozen"], expected) < 1e-6


def test_replicas_across_nodes_have_the_gradients_of_one_process(single, double):
    for results in double:
        assert relative_difference(results["replicated"][0], single[4096][0]) < 1e-6


def test_a_reward_that_fails_on_one_rank_stops_all_with_the_same_error(double):
    [error] = {results["reward_error"] for results in double}
    assert error.startswith("sample 7: reward mine raised; mend the reward")


def test_two_processes_log_the_figures_of_one(single, double):
    for results in double:
        for name in ("loss", "kl", "entropy", "clip_low", "clip_high", "grad_norm"):
            assert results[60][1][name] == pytest.approx(single[4096][1][name], rel=1e-5, abs=1e-9)


def test_a_gathered_model_draws_what_one_process_draws_and_shards_again(single, double):
    for results in double:
        first, second = results["drawn"]
        assert not results["drawn_from_shards"]
        assert first == [ids[:5] for ids in single["drawn"][:2]] and second == single["drawn"][:3]
        assert relative_difference(results["after_draw"][0], single[4096][0]) < 1e-6


def test_ranks_draw_different_numbers_of_tokens_from_layers_that_stay_sharded(double):
    for results in double:
        assert results["drawn_in_lockstep_from_shards"] and results["drawn_in_lockstep"] == results["drawn"]


def test_after_drawing_a_forward_frees_each_block_again(double):
    assert all(results["freed"] for results in double)


@pytest.mark.parametrize("variant", ["dapo", "dr_grpo", "gspo"])
def test_every_variant_is_exact_under_any_cut(variant):
    model, processor = make_model()
    cut, _, rows = step_gradients(model, None, processor, ALONE, 60, variant=variant, beta=0.0)
    whole, _, _ = step_gradients(model, None, processor, ALONE, 4096, variant=variant, beta=0.0)
    assert rows > 1 and relative_difference(cut, whole) < 1e-6


def test_a_loss_normalised_per_row_would_fail_the_comparison(single, monkeypatch):
    def per_row(*arguments, num_completions, num_tokens, **options):
        return real_loss(*arguments, **options)

    real_loss = train.grpo_loss
    monkeypatch.setattr(train, "grpo_loss", per_row)
    model, processor = make_model()
    wrong, _, _ = step_gradients(model, make_model(seed=4)[0], processor, ALONE, 60)
    assert relative_difference(wrong, single[4096][0]) > 1e-2


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_rows_of_all_shards_cover_a_tensor_as_torch_chunk_does():
    for rows in range(1, 12):
        for shards in range(1, 6):
            parts = [torch.arange(rows)[slice(*_row_range(rows, shards, shard))] for shard in range(shards)]
            chunks = [*torch.arange(rows).chunk(shards), *[torch.empty(0, dtype=torch.long)] * shards][:shards]
            assert all(part.equal(chunk) for part, chunk in zip(parts, chunks, strict=True))


def test_training_continues_exactly_from_a_checkpoint(single):
    model, processor = make_model(seed=8)
    optimizer = adamw(model)
    state = load_training_state(single["directory"] / "one", model, [optimizer], ALONE)
    assert state["step"] == 2
    adamw_steps(model, processor, optimizer, ALONE, 1)
    for name, parameter in model.named_parameters():
        assert parameter.equal(single["trained"][name]), name


def test_one_process_continues_a_checkpoint_of_two_and_two_a_checkpoint_of_one(single, double):
    for name, expected in single["trained"].items():
        assert_close(double[0]["from_one"][name], expected, rtol=1e-5, atol=1e-6)
        assert_close(double[0]["trained"][name], expected, rtol=1e-5, atol=1e-6)
    model, processor = make_model(seed=8)
    optimizer = adamw(model)
    load_training_state(single["directory"] / "two", model, [optimizer], ALONE)
    adamw_steps(model, processor, optimizer, ALONE, 1)
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), double[0]["trained"][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_checkpoint_is_a_hugging_face_directory_that_plain_transformers_loads(single, double, name):
    directory = single["directory"] / name
    model = AutoModelForImageTextToText.from_pretrained(directory)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    for key, parameter in model.named_parameters():
        assert_close(parameter.detach(), single["saved"][key], rtol=1e-5, atol=1e-6)
    for file in ("tokenizer.json", "processor_config.json", "generation_config.json"):
        assert (directory / file).is_file()
    assert json.loads((directory / "config.json").read_text())["architectures"] == [type(model).__name__]


def test_a_checkpoint_in_bf16_says_so_and_keeps_fp32_masters(single, tmp_path):
    model, _ = make_model()
    optimizer = adamw(model)
    source = packaging(single["directory"] / "source", torch.bfloat16)
    save_checkpoint(tmp_path / "low", model, [optimizer], {"step": 0}, ALONE, source)
    assert json.loads((tmp_path / "low" / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "low" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # tied: it is the embedding
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "low").dtype == torch.bfloat16
    with safe_open(tmp_path / "low" / "state-00000.training", "pt") as file:
        assert file.get_tensor("master.model.language_model.norm.weight").dtype == torch.float32


def test_every_file_beside_the_weights_is_copied_and_only_the_budget_in_it_changed(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "copy").mkdir()
    budget = {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}, "patch_size": 14}
    for name in SIDE_FILES:
        (tmp_path / "source" / name).write_text(json.dumps(budget | {"name": name}))
    (tmp_path / "source" / "notes.txt").write_text("not copied")
    copy_side_files(str(tmp_path / "source"), tmp_path / "copy", (256, 4096))
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {*SIDE_FILES}
    for name in SIDE_FILES:
        size = {"shortest_edge": 256, "longest_edge": 4096} if name.startswith("p") else budget["size"]
        expected = budget | {"name": name, "size": size}  # videos have a budget of their own, which no training uses
        assert json.loads((tmp_path / "copy" / name).read_text()) == expected


def test_muon_takes_the_same_step_over_shards_as_over_whole_matrices(single, double):
    model = make_model(seed=7)[0]
    matrices = {id(p) for p in make_optimizers(model, MUON)[0].param_groups[0]["params"]}
    for name, before in model.named_parameters():
        if id(before) in matrices:
            step, difference = single["muon"][name] - before, double[0]["muon"][name] - single["muon"][name]
            # Newton and Schulz iterate in bf16, which rounds a sharded sum differently: up to a tenth of the step
            assert step.norm() > 0 and difference.norm() < 0.2 * step.norm(), name
    assert len(matrices) > 30


def test_a_directory_without_training_state_is_refused(single):
    with pytest.raises(ValueError, match="trainer.json"):
        load_training_state(single["directory"] / "source", make_model()[0], [], ALONE)


def test_bf16_computes_over_fp32_masters_in_one_process():
    with process_group(bf16=True) as world:
        model, processor = make_model()
        model = shard_model(model, world, compute_dtype=torch.bfloat16)
        low, figures, _ = step_gradients(model, None, processor, world, 4096, beta=0.0)
        assert all(p.dtype == torch.float32 for p in model.parameters())
    exact, reference, _ = step_gradients(make_model()[0], None, processor, ALONE, 4096, beta=0.0)
    assert all(g.dtype == torch.float32 for g in low.values())
    assert figures["grad_norm"] == pytest.approx(reference["grad_norm"], rel=0.05)
    assert 1e-5 < relative_difference(low, exact) < 0.1  # bf16 was really used, and is close
