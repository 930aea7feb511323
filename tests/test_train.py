"""train.py: options, one step looked at closely, and whole runs on a small checkpoint."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    ALONE,
    CONFIG,
    Recorder,
    fixed,
    make_model,
    make_rollout,
    only_numbers,
    options,
    repeated_logprobs,
    run,
)
from PIL import Image

import toy
import toy.model
import toy.scenes
import train
from data import Sample
from grpo import grpo_loss
from infra import memory
from infra.memory import RowBudget
from infra.options import parse_options
from model.vlm import Prompt
from rollout import stack_groups, takes_seen_images
from train import Config, blank_prompt, causes_for_concern, learn, main, make_rows, roll_out, score_texts

HERE = Path(__file__).parent.parent


# ---- one step ------------------------------------------------------------------------------------------------------


def prompt_of(answer="[0, 0, 10, 10]", reward="", has_boxes=True):
    return Prompt({}, answer, Sample("s", "q", answer, (), reward, has_boxes, "here"), None, None)


def test_a_samples_own_method_replaces_the_first_reward_only():
    config = replace(CONFIG, rewards=["iou", "format"], group_size=1 + 1)
    good = "<think>x</think><answer>[0, 0, 10, 10]</answer>"
    choice = "<think>x</think><answer>B</answer>"
    prompts = [prompt_of(), prompt_of("B", "mcq", False)]
    rewards = score_texts([good, "[0, 0, 5, 10]", choice, "A"], prompts, config, torch.device("cpu"))[0]
    assert rewards[:, 1].tolist() == [1, 0, 1, 0]
    assert rewards[0, 0] == 1 and rewards[2, 0] == 1 and rewards[3, 0] == 0


def test_a_reward_of_ones_own_is_loaded_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text("def length(completion, answer):\n    return float(len(completion))\n")
    config = replace(CONFIG, rewards=[f"{tmp_path}/mine.py:length"], group_size=2)
    assert score_texts(["abc", ""], [prompt_of()], config, torch.device("cpu"))[0].tolist() == [[3.0], [0.0]]


@pytest.mark.parametrize("row_tokens", [60, 4096])
def test_a_step_has_the_gradient_of_the_loss_over_all_its_completions_at_once(row_tokens):
    model, processor = make_model()
    config = replace(CONFIG, beta=0.0)
    rollout = make_rollout(model, processor, ALONE)
    recorder = Recorder(model)
    learn(model, [recorder], rollout, None, config, ALONE, blank_prompt(processor), [], fixed(row_tokens))

    logprobs = stack_groups(repeated_logprobs(model, rollout.prompts, rollout.completions))  # the naive way
    lengths = torch.tensor([len(ids) for group in rollout.completions for ids in group])
    mask = torch.arange(logprobs.shape[1]) < lengths[:, None]
    loss, _ = grpo_loss(logprobs, logprobs.detach(), None, rollout.advantages, mask, beta=0.0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss, parameters)
    largest = max(gradient.abs().max() for gradient in expected)
    for name, gradient in zip(names, expected, strict=True):
        assert (recorder.gradients[name] - gradient).abs().max() < 1e-5 * largest, name


def sgd_step(model, processor, rollout, config):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return learn(model, [optimizer], rollout, None, config, ALONE, blank_prompt(processor), [], fixed())


def test_later_passes_measure_their_ratio_from_the_weights_that_drew(monkeypatch):
    calls = []

    def spy(logprobs, old, *arguments, **named):
        calls.append((logprobs.detach().clone(), old.clone()))
        return real_loss(logprobs, old, *arguments, **named)

    real_loss = train.grpo_loss
    monkeypatch.setattr(train, "grpo_loss", spy)
    model, processor = make_model()
    config = replace(CONFIG, beta=0.0, num_iterations=2)
    rollout = make_rollout(model, processor, ALONE)
    sgd_step(model, processor, rollout, config)
    (first, first_old), (second, second_old) = calls
    assert first_old.equal(first) and second_old.equal(first) and not second.equal(first)


def equal_rewards(rollout, groups):
    """The rollout as if all completions of these groups had earned the same."""
    advantages = rollout.advantages.clone().view(-1, CONFIG.group_size)
    advantages[groups] = 0.0
    return replace(rollout, advantages=advantages.flatten())


def gradients_of(model, processor, rollout, budget=None, **changes):
    recorder = Recorder(model)
    config = replace(CONFIG, **{"beta": 0.0, **changes})
    figures = learn(model, [recorder], rollout, None, config, ALONE, blank_prompt(processor), [], budget or fixed())
    return recorder.gradients, figures


@pytest.mark.parametrize("variant", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_groups_of_equal_rewards_are_left_out_and_the_gradient_is_the_same(variant, monkeypatch):
    model, processor = make_model()
    rollout = equal_rewards(make_rollout(model, processor, ALONE), [0, 2])
    rows = make_rows(rollout, replace(CONFIG, beta=0.0), ALONE, blank_prompt(processor), 4096)
    assert [len(row.members) for row in rows] == [6] and rows[0].members.tolist() == [3, 4, 5, 9, 10, 11]
    short, figures = gradients_of(model, processor, rollout, variant=variant)
    with_all = replace(CONFIG, beta=1.0)  # a penalty needs every group
    monkeypatch.setattr(train, "make_rows", lambda r, config, *rest: make_rows(r, with_all, *rest))
    complete, expected = gradients_of(model, processor, rollout, variant=variant)
    largest = max(gradient.abs().max() for gradient in complete.values())
    assert all((short[name] - complete[name]).abs().max() < 1e-6 * largest for name in complete)
    assert figures["loss"] == pytest.approx(expected["loss"], abs=1e-6) and figures["entropy"] > 0


def test_a_step_that_teaches_nothing_runs_nothing_and_has_a_gradient_of_zero(monkeypatch):
    model, processor = make_model()
    rollout = equal_rewards(make_rollout(model, processor, ALONE), slice(None))
    monkeypatch.setattr(train, "score_row", None)
    gradients, figures = gradients_of(model, processor, rollout)
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    assert all((gradient == 0).all() for gradient in gradients.values())  # zero, not none: moments decay as they would
    assert figures["loss"] == figures["entropy"] == figures["grad_norm"] == 0


def out_of_memory_above(tokens, monkeypatch, fail_in_backward=False):
    """Makes rows of more tokens fail as a full GPU does, in the forward pass or after it; returns the rows' sizes."""
    sizes, real = [], train.score_row

    def score(model, row, *rest):
        sizes.append(sum(len(ids) for group in row.completions for ids in group))
        sizes[-1] += sum(prompt["input_ids"].shape[1] for prompt in row.prompts)
        logprobs, entropies = real(model, row, *rest)
        if sizes[-1] > tokens:
            if not fail_in_backward:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More.")
            logprobs.register_hook(fail)
        return logprobs, entropies

    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More.")

    monkeypatch.setattr(train, "score_row", score)
    return sizes


@pytest.mark.parametrize("fail_in_backward", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_pass_that_runs_out_of_memory_is_repeated_with_half_the_tokens(monkeypatch, fail_in_backward, passes, capfd):
    model, processor = make_model()
    rollout = make_rollout(model, processor, ALONE)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    results = []
    monkeypatch.setattr(memory, "MIN_ROW_TOKENS", 16)
    for tokens in (None, 100):
        model.load_state_dict(weights)
        budget = RowBudget(2048, may_shrink=True)
        sizes = out_of_memory_above(tokens, monkeypatch, fail_in_backward) if tokens else []
        config, optimizer = replace(CONFIG, beta=0.0, num_iterations=passes), torch.optim.SGD(model.parameters(), 0.1)
        figures = learn(model, [optimizer], rollout, None, config, ALONE, blank_prompt(processor), [], budget)
        results.append(({name: value.clone() for name, value in model.state_dict().items()}, figures))
    assert budget.tokens == 64 and max(sizes) > 100 >= sizes[-1]
    assert "--row_tokens 64, from here on (CUDA out of memory)" in capfd.readouterr().out
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, rtol=0, atol=1e-6)
    assert results[1][1] == pytest.approx(results[0][1], abs=1e-5)


def test_out_of_memory_with_a_fixed_budget_or_in_the_smallest_row_names_the_remedies(monkeypatch):
    model, processor = make_model()
    rollout = make_rollout(model, processor, ALONE)
    out_of_memory_above(0, monkeypatch)
    for budget in (fixed(4096), RowBudget(4096, may_shrink=True)):
        with pytest.raises(ValueError, match=r"out of memory in a row of \d+ tokens .*lower --row_tokens"):
            gradients_of(model, processor, rollout, budget)


def test_the_gap_between_drawing_and_training_is_rounding_alone():
    model, processor = make_model()
    config = replace(CONFIG, rewards=["iou"], beta=0.0)
    inputs = make_rollout(model, processor, ALONE).prompts
    prompts = [replace(prompt, answer="[0, 0, 1, 1]") for prompt in inputs]
    rollout = roll_out(
        model, processor, prompts, config, ALONE, generator=torch.Generator().manual_seed(0), eos_ids=[2], banned_ids=[]
    )
    rollout = replace(rollout, advantages=torch.ones_like(rollout.advantages))  # as if the rewards differed
    figures = learn(model, [Recorder(model)], rollout, None, config, ALONE, blank_prompt(processor), [], fixed())
    assert 0 < figures["draw_gap_max"] < 1e-4 and figures["draw_gap"] <= figures["draw_gap_max"]


def test_warnings_name_the_likely_cause():
    fine = {"unparsed": 0.0, "truncated": 0.0, "groups_equal": 0.1}
    config = replace(CONFIG, rewards=["iou"])
    assert causes_for_concern([fine] * 3, config) == []
    assert "cannot be read" in causes_for_concern([{**fine, "unparsed": 1.0}], config)[0]
    assert "--max_completion_tokens" in causes_for_concern([{**fine, "truncated": 0.8}], config)[0]
    assert "equal rewards" in causes_for_concern([{**fine, "groups_equal": 1.0}], config)[0]


BAD_REWARDS = """
import time

def nan(completion, answer):
    return float("nan")

def nothing(completion, answer):
    return None

def fails(completion, answer):
    return 1.0 if completion else 1 / 0

def sleeps(completion, answer):
    time.sleep(0.0 if completion else 60)
    return 1.0

def swallows(completion, answer):
    try:
        while not completion:
            pass
    except Exception:
        return 0.5
    return 1.0
"""


@pytest.mark.parametrize(
    "name, reason",
    [
        ("nan", "gave nan, no finite number"),
        ("nothing", "raised TypeError"),
        ("fails", "raised ZeroDivisionError: division by zero"),
        ("sleeps", "took longer than 0.2 s"),
        ("swallows", "took longer than 0.2 s"),
    ],
)
def test_a_reward_that_raises_hangs_or_gives_no_number_counts_0_and_is_named_with_its_sample(tmp_path, name, reason):
    (tmp_path / "bad.py").write_text(BAD_REWARDS)
    spec = f"{tmp_path}/bad.py:{name}"
    config = replace(CONFIG, rewards=["iou", spec], group_size=2, reward_seconds=0.2)
    rewards, errors = score_texts(["[0, 0, 10, 10]", ""], [prompt_of()], config, torch.device("cpu"))
    assert rewards[1].tolist() == [0.0, 0.0] and errors[-1].startswith(f"here (s): reward {spec} {reason}")
    assert errors[-1].endswith("for ''") and len(errors) == (2 if name in ("nan", "nothing") else 1)
    assert rewards[0].tolist() == ([0.0, 0.0] if len(errors) == 2 else [0.0, 1.0]) or rewards[0, 0] > 0
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("answer", ["stop", "zero"])
def test_a_failing_reward_stops_the_run_with_its_sample_or_scores_0_and_is_counted(
    checkpoint, scenes, tmp_path, answer, capsys
):
    (tmp_path / "bad.py").write_text("def bad(completion, answer):\n    return 1 / 0 if len(completion) % 2 else 1.0\n")
    more = ["--steps", "2", "--eval_every", "0", "--rewards", f"{tmp_path}/bad.py:bad", "--on_reward_error", answer]
    if answer == "stop":
        with pytest.raises(ValueError, match=r"train.jsonl:\d+ .*bad raised ZeroDivisionError.*--on_reward_error zero"):
            run(checkpoint, scenes, tmp_path / "out", *more)
        return
    rows = run(checkpoint, scenes, tmp_path / "out", *more)
    assert [row["reward"] for row in rows] == pytest.approx([1 - row["reward_errors"] / 6 for row in rows])
    assert sum(row["reward_errors"] for row in rows) > 0 and "score 0, the first: " in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_is_counted_and_changes_no_weight():
    model, processor = make_model()
    rollout = make_rollout(model, processor, ALONE)
    rollout = replace(rollout, advantages=torch.full_like(rollout.advantages, torch.inf))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = replace(CONFIG, beta=0.0)
    figures = sgd_step(model, processor, rollout, config)
    assert figures["skipped_updates"] == 1
    assert all(p.equal(before[name]) and p.grad is None for name, p in model.named_parameters())


def test_groups_drawn_a_few_at_a_time_are_complete_and_in_order():
    model, processor = make_model()
    config = replace(CONFIG, rewards=["iou"], beta=0.0, draw_batch_size=4, temperature=1e-4)
    prompts = make_rollout(model, processor, ALONE).prompts
    prompts = [replace(prompt, answer="[0, 0, 1, 1]") for prompt in prompts]
    options = {"eos_ids": [2], "banned_ids": []}
    few = roll_out(model, processor, prompts, config, ALONE, generator=torch.Generator().manual_seed(0), **options)
    config = replace(config, draw_batch_size=512)
    many = roll_out(model, processor, prompts, config, ALONE, generator=torch.Generator().manual_seed(0), **options)
    assert few.texts == many.texts and len(few.texts) == 12  # nearly greedy, so the noise does not matter


# ---- whole runs ----------------------------------------------------------------------------------------------------


def test_a_run_writes_what_the_readme_lists(checkpoint, scenes, tmp_path):
    rows = run(checkpoint, scenes, tmp_path / "out", "--steps", "2", "--eval_every", "1", "--tensorboard")
    out = tmp_path / "out"
    assert [row["step"] for row in rows] == [1, 2]
    glossary = (HERE / "README.md").read_text()
    assert all(f"`{name}`" in glossary or name.startswith("reward/") for name in rows[0]), set(rows[0])
    evaluations = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evaluations] == [0, 1, 2] and "eval/test/mean_iou" in evaluations[0]
    group = json.loads((out / "completions.jsonl").read_text().splitlines()[0])["group"]
    assert len(group) == 3 and group[0].keys() == {"completion", "rewards", "advantage"}
    assert (out / "checkpoints" / "step-000002" / "model.safetensors").exists()
    assert json.loads((out / "config.json").read_text())["options"]["group_size"] == 3
    assert list((out / "tensorboard").iterdir())


def test_a_resumed_run_is_the_run_that_was_not_interrupted(checkpoint, scenes, tmp_path):
    (tmp_path / "mine.py").write_text("def length(completion, answer):\n    return len(completion) % 5 / 4\n")
    shared = ["--eval_every", "0", "--save_every", "2", "--num_iterations", "2"]
    shared += ["--rewards", f"{tmp_path}/mine.py:length"]  # which varies: else nothing moves, and no loss is seen
    whole = run(checkpoint, scenes, tmp_path / "whole", "--steps", "4", *shared)
    run(checkpoint, scenes, tmp_path / "cut", "--steps", "3", *shared)
    (tmp_path / "cut" / "checkpoints" / "step-000003").rename(tmp_path / "gone")  # as if it died after step 2 was saved
    main(parse_options(Config, ["--resume", str(tmp_path / "cut"), "--steps", "4"], {}))
    cut = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert only_numbers(cut) == only_numbers(whole)
    assert all(row["grad_norm"] > 0 and row["reward_std"] > 0 for row in whole) and whole[-1]["kl"] > 0
    weights = [
        (tmp_path / name / "checkpoints" / "step-000004" / "model.safetensors").read_bytes()
        for name in ("whole", "cut")
    ]
    assert weights[0] == weights[1]


def test_a_resumed_run_keeps_its_options_and_a_second_run_its_own_directory(checkpoint, scenes, tmp_path):
    run(checkpoint, scenes, tmp_path / "out", "--steps", "1", "--eval_every", "0")
    with pytest.raises(ValueError, match="group_size was 3 in the run resumed and is 4 now"):
        parse_options(Config, ["--resume", str(tmp_path / "out"), "--group_size", "4"], {})
    with pytest.raises(ValueError, match="holds a run"):
        run(checkpoint, scenes, tmp_path / "out", "--steps", "1", "--eval_every", "0")
    with pytest.raises(ValueError, match="no such file"):
        parse_options(Config, ["--resume", str(tmp_path / "none")], {})


def test_a_text_task_without_images_trains_and_reports_its_reward(checkpoint, tmp_path):
    lines = [json.dumps({"conversations": [{"value": f"{n} + 1?"}, {"value": str(n + 1)}]}) for n in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:3]))
    run(checkpoint, tmp_path, tmp_path / "out", "--steps", "1", "--rewards", "numeric", "format", "--beta", "0")
    evaluation = json.loads((tmp_path / "out" / "eval.jsonl").read_text().splitlines()[0])
    assert "eval/test/reward" in evaluation and "eval/test/mean_iou" not in evaluation


def test_detection_rewards_train_end_to_end(checkpoint, tmp_path, monkeypatch):
    toy.scenes.write_detection_split(tmp_path, "train", 8, seed=1)
    toy.scenes.write_detection_split(tmp_path, "test", 3, seed=2)
    real_decode = train.roll_out

    def spoken(policy, processor, prompts, *arguments, **options):
        # An untrained model says nothing readable: let it say the truth every third time, and "None" otherwise.
        texts = iter(f"<answer>{p.answer if i == 0 else 'None'}</answer>" for p in prompts for i in range(3))
        monkeypatch.setattr(processor.tokenizer, "batch_decode", lambda ids, **options: [next(texts) for _ in ids])
        return real_decode(policy, processor, prompts, *arguments, **options)

    monkeypatch.setattr(train, "roll_out", spoken)
    rows = run(checkpoint, tmp_path, tmp_path / "out", "--steps", "3", "--rewards", "iou", "format", "--beta", "0")
    assert all(row["reward/iou"] >= 1 / 3 for row in rows)  # each sample's own od_length stands in for iou
    assert max(row["reward_std"] for row in rows) > 0 and max(row["grad_norm"] for row in rows) > 0
    evaluation = json.loads((tmp_path / "out" / "eval.jsonl").read_text().splitlines()[0])
    assert "eval/test/reward" in evaluation


def test_without_evaluation_data_a_twentieth_is_held_out(checkpoint, scenes, tmp_path):
    argv = options(checkpoint, scenes, tmp_path / "out", "--steps", "1")
    place = argv.index("--eval_data")
    main(parse_options(Config, argv[:place] + argv[place + 2 :], {}))
    assert json.loads((tmp_path / "out" / "eval.jsonl").read_text().splitlines()[0])["eval/held_out/samples"] == 1


def test_a_dry_run_prints_what_a_run_would_do_and_writes_nothing(checkpoint, scenes, tmp_path, capsys):
    main(parse_options(Config, options(checkpoint, scenes, tmp_path / "out", "--dry_run"), {}))
    text = capsys.readouterr().out
    assert "24 samples; 2 prompts and 6 completions a step; 12.0 steps an epoch; 12 steps" in text
    assert "1,104,672 of 1,104,672 parameters trained" in text and "GB  reference" in text
    assert not (tmp_path / "out").exists()


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(checkpoint, scenes, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real_step(*arguments)

    real_step = train.train_step
    monkeypatch.setattr(train, "train_step", interrupted)
    rows = run(checkpoint, scenes, tmp_path / "out", "--steps", "5", "--eval_every", "0")
    assert len(rows) == 1 and (tmp_path / "out" / "checkpoints" / "step-000001").exists()
    assert f"--resume {tmp_path / 'out'}" in capsys.readouterr().out


def test_a_scheduler_that_says_sigterm_twice_is_heard_once(checkpoint, scenes, tmp_path, monkeypatch):
    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return real_step(*arguments)

    real_step = train.train_step
    monkeypatch.setattr(train, "train_step", interrupted)
    assert len(run(checkpoint, scenes, tmp_path / "out", "--steps", "5", "--eval_every", "0")) == 1


def test_a_checkpoint_keeps_the_pixel_budget_it_was_trained_under(checkpoint, scenes, tmp_path):
    run(checkpoint, scenes, tmp_path / "out", "--steps", "1", "--eval_every", "0", "--max_pixels", "2048")
    config = json.loads((tmp_path / "out" / "checkpoints" / "step-000001" / "processor_config.json").read_text())
    assert config["image_processor"]["size"] == {"shortest_edge": 256, "longest_edge": 2048}


def test_a_checkpoint_is_evaluated_under_the_prompt_of_its_run(checkpoint, scenes, tmp_path):
    import eval as evaluation

    run(checkpoint, scenes, tmp_path / "out", "--steps", "1", "--eval_every", "0")
    argv = ["--model", str(tmp_path / "out" / "checkpoints" / "step-000001"), "--data", "d"]
    config = parse_options(evaluation.Config, argv, {}, evaluation.run_options)
    assert (config.template, config.max_completion_tokens, config.min_pixels) == ("plain", 6, 256)
    config = parse_options(evaluation.Config, [*argv, "--template", "rec"], {}, evaluation.run_options)
    assert config.template == "rec"


def test_torchrun_with_two_processes_trains_and_logs_once(checkpoint, scenes, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(HERE / "train.py"),
    ]
    more = ["--steps", "2", "--eval_every", "2", "--freeze_vision", "--gradient_checkpointing", "--draw_sharded"]
    done = subprocess.run(
        command + options(checkpoint, scenes, tmp_path / "out", *more), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert len(list((tmp_path / "out" / "checkpoints" / "step-000002").glob("state-*.training"))) == 2


def test_images_are_opened_once_per_prompt_and_step(checkpoint, scenes, tmp_path, monkeypatch):
    opened = []
    real_open = Image.open
    rows_before = run(checkpoint, scenes, tmp_path / "a", "--steps", "1", "--eval_every", "0")
    monkeypatch.setattr("vlm.load_image", lambda path, root: opened.append(path) or real_open(path).convert("RGB"))
    rows = run(checkpoint, scenes, tmp_path / "b", "--steps", "1", "--eval_every", "0")
    assert len(opened) == 2 and only_numbers(rows) == only_numbers(rows_before)  # two prompts, six completions


def test_a_frozen_tower_runs_once_per_prompt_and_step_and_changes_nothing(checkpoint, scenes, tmp_path, monkeypatch):
    more = ["--steps", "2", "--eval_every", "0", "--freeze_vision", "--num_iterations", "2"]
    if not takes_seen_images(toy.model.build_model(toy.model.build_processor().tokenizer)):
        pytest.skip("this version of transformers does not take images ready-made")
    calls = []
    tower = type(toy.model.build_model(toy.model.build_processor().tokenizer).model.visual)
    monkeypatch.setattr(
        tower, "forward", lambda self, *a, real=tower.forward, **o: calls.append(1) or real(self, *a, **o)
    )
    once = run(checkpoint, scenes, tmp_path / "a", *more)
    assert len(calls) == 1 + 2 * 2  # the blank, two prompts in two steps
    monkeypatch.setattr(train, "tower_is_frozen", lambda model: False)
    again = run(checkpoint, scenes, tmp_path / "b", *more)
    for a, b in zip(only_numbers(once), only_numbers(again), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
