"""train.py: what completions are paid, one step looked at closely, and whole runs on a small checkpoint."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ALONE,
    CONFIG,
    GROUP,
    Recorder,
    learn,
    make_model,
    make_rollout,
    make_run,
    only_numbers,
    options,
    repeated_logprobs,
    run,
    run_here,
)
from PIL import Image

import eval as evaluation
import toy.model
import toy.scenes
import train
from data import Sample
from grpo import group_advantages, grpo_loss
from infra.config import EvalConfig
from infra.parallel import World
from infra.runlog import read_rows
from model.vlm import Prompt
from rollout import stack_groups, takes_image_features

HERE = Path(__file__).parent.parent


# ---- pay -----------------------------------------------------------------------------------------------------------

BOX = "<think>x</think><answer>[0, 0, 10, 10]</answer>"
LETTER = "<think>x</think><answer>B</answer>"


def prompt_of(answer="[0, 0, 10, 10]", reward="", file=0):
    sample = Sample(f"sample {file}", "q", answer, ("a.png",), reward, True, "here", file=file)
    return Prompt({}, answer, sample, None, None)


def payer(texts, **changes):
    """A run whose completions decode to these texts."""
    run = make_run(*make_model(), ALONE, [], group_size=2, **changes)
    run.processor = SimpleNamespace(tokenizer=SimpleNamespace(batch_decode=lambda ids, **options: texts))
    return run


def paid(prompts, texts, **changes):
    completions = [[torch.tensor([2])] * 2 for _ in prompts]
    return train.pay(payer(texts, **changes), prompts, completions, torch.zeros(len(texts), 1))


def test_rewards_read_the_thought_that_the_chat_template_has_opened():
    prompt = replace(prompt_of(), opening="<think>\n")
    rollout = paid([prompt], [BOX.removeprefix("<think>"), "<answer>x</answer>"], rewards=["iou", "format"])
    assert rollout.texts[0] == "<think>\nx</think><answer>[0, 0, 10, 10]</answer>"
    assert [row["format"] for row in rollout.paid] == [1.0, 0.0]  # the second does not end the thought


def write_plugin(tmp_path, code):
    (tmp_path / "mine.py").write_text(code)
    return f"{tmp_path}/mine.py"


def test_a_samples_own_method_replaces_the_first_reward_only_and_is_paid_under_its_own_name():
    texts = [BOX, "[0, 0, 5, 10]", LETTER, "A"]
    rollout = paid([prompt_of(), prompt_of("B", "mcq")], texts, rewards=["iou", "format"], reward_weights=[2.0, 0.5])
    assert rollout.paid == [
        {"iou": 1, "format": 1}, {"iou": 0, "format": 0}, {"mcq": 1, "format": 1}, {"mcq": 0, "format": 0}
    ]  # fmt: skip
    assert rollout.totals.tolist() == [2.5, 0, 2.5, 0] and rollout.num_reward_errors == 0
    assert rollout.texts == texts and rollout.advantages is None


def test_a_samples_own_method_is_logged_under_its_own_name():
    boxes = '<answer>```json\n[{"bbox_2d": [0, 0, 10, 10], "label": "a"}]\n```</answer>'
    prompt = prompt_of(boxes, "od_length")
    rollout = paid([prompt], [boxes, "None"], rewards=["od_ap", "format"])
    run = make_run(*make_model(), ALONE, [], group_size=2, rewards=["od_ap", "format"])
    figures = train.rollout_figures(run, rollout)
    assert figures["reward/od_length"] == figures["reward"] == 0.5 and figures["reward/format"] == 0
    assert "reward/od_ap" not in figures and figures["reward_errors"] == 0


def test_each_file_pays_its_own_rewards_under_its_own_weights(tmp_path):
    mix = [
        {"file": "rec.jsonl", "rewards": ["iou", "format"], "weights": [3, 1]},
        {"file": "math.jsonl", "rewards": ["math"], "weights": [0.25]},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(mix))
    prompts = [prompt_of("7", file=1), prompt_of()]
    rollout = paid(prompts, ["7", "8", BOX, BOX.replace("10]", "5]")], data="", mix=str(tmp_path / "mix.json"))
    assert [list(values) for values in rollout.paid] == [["math"]] * 2 + [["iou", "format"]] * 2
    assert rollout.totals.tolist() == [0.25, 0, 4, 2.5]


def test_a_plugin_gets_the_text_the_truth_and_the_sample(tmp_path):
    code = """
def lengths(completion, answer, sample):
    return float("".join(str(len(x)) for x in (completion, answer, sample["images"], sample["id"], sample["question"])))
"""
    rollout = paid([prompt_of("four")], ["abc", ""], rewards=[write_plugin(tmp_path, code) + ":lengths"])
    assert rollout.totals.tolist() == [34181, 4181]  # the text, "four", one image, "sample 0", "q"


def test_a_plugin_draws_the_same_in_a_step_that_is_repeated_and_no_two_calls_draw_the_same(tmp_path):
    plugin = write_plugin(tmp_path, "def drawn(completion, answer, rng):\n    return rng.random()\n") + ":drawn"
    first, again = (paid([prompt_of()] * 2, list("abcd"), rewards=[plugin]).totals.tolist() for _ in range(2))
    assert first == again and len(set(first)) == 4
    run, seeds = payer([]), set()
    for step, rank, number in itertools.product(range(3), range(3), range(4)):
        run.step, run.world = step, World(rank, 3, torch.device("cpu"), None)
        seeds.add(train.reward_call(run, prompt_of(), number, plugin, "").seed)
    assert len(seeds) == 36


def test_a_reward_that_raises_stops_the_run_with_its_sample_or_scores_0_and_is_counted(tmp_path, capsys):
    path = write_plugin(tmp_path, "def bad(completion, answer):\n    return 1 / len(completion)\n")
    rewards = ["format", f"{path}:bad"]
    error = rf"sample sample 0: reward {path}:bad raised ZeroDivisionError.*for ''; mend .*--on_reward_error zero"
    with pytest.raises(ValueError, match=error):
        paid([prompt_of()], [BOX, ""], rewards=rewards)
    rollout = paid([prompt_of()], [BOX, ""], rewards=rewards, on_reward_error="zero")
    assert rollout.totals.tolist() == pytest.approx([1 + 1 / len(BOX), 0]) and rollout.num_reward_errors == 1
    assert f"warning: 1 rewards count 0, the first: sample sample 0: reward {path}:bad" in capsys.readouterr().out


def test_the_error_that_stops_a_run_is_one_that_a_reward_made(tmp_path):
    """Other calls are given up when one fails, and are not to blame though they come first."""
    code = """
import time

def slow(completion, answer):
    time.sleep(0.5 * (completion == "slow"))
    return 1 / len(completion)
"""
    with pytest.raises(ValueError, match="raised ZeroDivisionError.* for ''"):
        paid([prompt_of()], ["slow", ""], rewards=[write_plugin(tmp_path, code) + ":slow"])


# ---- one step ------------------------------------------------------------------------------------------------------


def test_dr_grpo_switches_the_division_by_the_deviation_off_unless_told_otherwise():
    for variant, told, divides in (
        ("grpo", None, True), ("dapo", None, True), ("gspo", None, True), ("dr_grpo", None, False),
        ("dr_grpo", True, True), ("grpo", False, False), ("dr_grpo", False, False),
    ):  # fmt: skip
        assert replace(CONFIG, variant=variant, scale_advantages=told).divides_by_deviation == divides


@pytest.mark.parametrize("divides", [True, False])
def test_the_advantages_of_a_step_are_divided_as_the_options_say(divides, monkeypatch):
    found, real = [], train.grpo_loss
    monkeypatch.setattr(train, "grpo_loss", lambda *values, **named: found.append(values[3]) or real(*values, **named))
    model, processor = make_model()
    rollout = make_rollout(model, processor, ALONE)
    run = make_run(model, processor, ALONE, [Recorder(model)], beta=0.0, scale_advantages=divides)
    learn(run, rollout)
    groups = rollout.totals.view(4, GROUP)
    expected = groups - groups.mean(1, keepdim=True)
    if divides:
        expected = expected / (groups.std(1, keepdim=True) + 1e-4)
    [row] = run.pack(rollout.prompts, rollout.completions, range(4))
    torch.testing.assert_close(found, [expected.flatten()[row.members]])


@pytest.mark.parametrize("row_tokens", [60, 4096])
def test_a_step_has_the_gradient_of_the_loss_over_all_its_completions_at_once(row_tokens):
    model, processor = make_model()
    rollout = make_rollout(model, processor, ALONE)
    recorder = Recorder(model)
    learn(make_run(model, processor, ALONE, [recorder], beta=0.0, row_tokens=row_tokens), rollout)

    logprobs = stack_groups(repeated_logprobs(model, rollout.prompts, rollout.completions))  # the naive way
    lengths = torch.tensor([len(ids) for group in rollout.completions for ids in group])
    mask = torch.arange(logprobs.shape[1]) < lengths[:, None]
    advantages = group_advantages(rollout.totals, GROUP)
    loss, _ = grpo_loss(logprobs, logprobs.detach(), None, advantages, mask, beta=0.0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(loss, parameters)
    largest = max(gradient.abs().max() for gradient in expected)
    for name, gradient in zip(names, expected, strict=True):
        assert (recorder.gradients[name] - gradient).abs().max() < 1e-5 * largest, name


def test_later_passes_measure_their_ratio_from_the_weights_that_drew(monkeypatch):
    calls = []

    def spy(logprobs, old, *arguments, **named):
        calls.append((logprobs.detach().clone(), old.clone()))
        return real_loss(logprobs, old, *arguments, **named)

    real_loss = train.grpo_loss
    monkeypatch.setattr(train, "grpo_loss", spy)
    model, processor = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = make_run(model, processor, ALONE, [optimizer], beta=0.0, num_iterations=2)
    learn(run, make_rollout(model, processor, ALONE))
    (first, first_old), (second, second_old) = calls
    assert first_old.equal(first) and second_old.equal(first) and not second.equal(first)


def equal_rewards(rollout, groups):
    """The rollout as if all completions of these groups had earned the same."""
    totals = rollout.totals.clone().view(-1, GROUP)
    totals[groups] = 0.3
    return replace(rollout, totals=totals.flatten())


def gradients_of(model, processor, rollout, **changes):
    recorder = Recorder(model)
    figures = learn(make_run(model, processor, ALONE, [recorder], **{"beta": 0.0, **changes}), rollout)
    return recorder.gradients, figures


@pytest.mark.parametrize("variant", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo"])
def test_groups_of_equal_rewards_are_left_out_and_the_gradient_is_the_same(variant, monkeypatch):
    model, processor = make_model()
    rollout = equal_rewards(make_rollout(model, processor, ALONE), [0, 2])
    advantages = group_advantages(rollout.totals, GROUP)
    assert train.groups_that_teach(advantages, replace(CONFIG, beta=0.0)) == [1, 3]
    assert train.groups_that_teach(advantages, CONFIG) == [0, 1, 2, 3]  # a penalty needs every group
    short, figures = gradients_of(model, processor, rollout, variant=variant)
    monkeypatch.setattr(train, "groups_that_teach", lambda advantages, config: range(4))
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
    assert figures["loss"] == figures["grad_norm"] == 0
    assert not {"entropy", "draw_gap", "draw_gap_max"} & figures.keys()  # of no token: absent, not 0


@pytest.mark.parametrize("variant", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_truncated_completions_are_masked_in_the_loss_its_denominators_and_its_figures(variant, beta, monkeypatch):
    """Against the loss over all completions at once in which their tokens are masked, as TRL does: they still count."""
    model, processor = make_model()
    reference, _ = make_model(seed=4)
    rollout = make_rollout(model, processor, ALONE)
    completions = [[ids.clone() for ids in group] for group in rollout.completions]
    ended = [[(number + index) % 3 != 0 for index in range(GROUP)] for number in range(4)]
    ended[2] = [False] * GROUP  # a group of which nothing is left
    for group, ends in zip(completions, ended, strict=True):
        for ids, end in zip(group, ends, strict=True):
            ids[-1] = 2 if end else 11
    rollout = replace(rollout, completions=completions)
    recorder = Recorder(model)
    run = make_run(model, processor, ALONE, [recorder], reference=reference, beta=beta, variant=variant,
                   mask_truncated=True, row_tokens=60)  # fmt: skip
    run.eos_ids = [2]
    figures = learn(run, rollout)

    logprobs = stack_groups(repeated_logprobs(model, rollout.prompts, completions))
    ref_logprobs = stack_groups(repeated_logprobs(reference, rollout.prompts, completions)).detach() if beta else None
    lengths = torch.tensor([len(ids) for group in completions for ids in group])
    mask = torch.arange(logprobs.shape[1]) < lengths[:, None]
    mask = mask & torch.tensor(ended).flatten()[:, None]
    advantages = group_advantages(rollout.totals, GROUP, scale=variant != "dr_grpo")
    loss, expected = grpo_loss(
        logprobs, logprobs.detach(), ref_logprobs, advantages, mask, beta=beta,
        variant=variant, max_completion_tokens=CONFIG.max_completion_tokens,
    )  # fmt: skip
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    largest = max(gradient.abs().max() for gradient in gradients)
    for name, gradient in zip(names, gradients, strict=True):
        assert (recorder.gradients[name] - gradient).abs().max() < 1e-5 * largest, name
    assert figures["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert figures["kl"] == pytest.approx(float(expected["kl"]), rel=1e-4, abs=1e-9)
    assert figures["draw_gap"] == pytest.approx(logprobs[mask].abs().mean().item(), rel=1e-5)  # it drew zeros
    assert figures["truncated"] == pytest.approx(1 - sum(map(sum, ended)) / 12)  # what was drawn is told as it is
    assert figures["completion_tokens"] == pytest.approx(float(lengths.float().mean()))


def test_a_step_of_truncated_completions_alone_has_a_gradient_of_zero():
    model, processor = make_model()
    gradients, figures = gradients_of(model, processor, make_rollout(model, processor, ALONE), mask_truncated=True)
    assert all((gradient == 0).all() for gradient in gradients.values())
    assert figures["loss"] == figures["grad_norm"] == 0 and "entropy" not in figures and figures["truncated"] == 1


def test_under_gdpo_a_step_learns_from_each_reward_of_each_file_by_its_weight(tmp_path):
    mix = [
        {"file": "rec.jsonl", "rewards": ["iou", "format"], "weights": [3, 0.5]},
        {"file": "math.jsonl", "rewards": ["math"], "weights": [0.25]},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(mix))
    texts = ["7", "8", BOX, "<answer>[0, 0, 10, 5]</answer>"]
    changes = {"data": "", "mix": str(tmp_path / "mix.json"), "advantages": "gdpo", "prompts_per_step": 2}
    rollout = paid([prompt_of("7", file=1), prompt_of()], texts, **changes)
    found = train.step_advantages(payer(texts, **changes), rollout)
    one = [0.5 / (0.5**0.5 + 1e-4), 0.25 / (0.125**0.5 + 1e-4)]  # 0 against 1; an IoU of 0.5 against 1
    sums = torch.tensor([0.25 * one[0], -0.25 * one[0], *[sign * (3 * one[1] + 0.5 * one[0]) for sign in (1, -1)]])
    torch.testing.assert_close(found, sums / (sums.std() + 1e-4))


def drawing_run(model, processor, **changes):
    """A run that can draw, and the prompts of make_rollout."""
    run = make_run(model, processor, ALONE, [Recorder(model)], beta=0.0, **changes)
    run.eos_ids, run.generator = [2], torch.Generator().manual_seed(0)
    return run, make_rollout(model, processor, ALONE).prompts


def test_the_gap_between_drawing_and_training_is_rounding_alone():
    model, processor = make_model()
    run, prompts = drawing_run(model, processor)
    prompts, completions, draw_logprobs = train.draw(run, prompts)
    rollout = replace(make_rollout(model, processor, ALONE), completions=completions, draw_logprobs=draw_logprobs)
    figures = learn(run, rollout)
    assert 0 < figures["draw_gap_max"] < 1e-4 and figures["draw_gap"] <= figures["draw_gap_max"]
    # One log-prob off by a half is the largest gap, and its share of all tokens the mean.
    draw_logprobs[4, 0] += 0.5
    figures, num_tokens = learn(run, rollout), sum(len(ids) for group in completions for ids in group)
    assert figures["draw_gap_max"] == pytest.approx(0.5, abs=1e-4)
    assert figures["draw_gap"] == pytest.approx(0.5 / num_tokens, abs=1e-4)


def test_groups_drawn_a_few_at_a_time_are_complete_and_in_order():
    model, processor = make_model()
    found = []
    for batch in (4, 512):  # nearly greedy, so the noise does not matter
        run, prompts = drawing_run(model, processor, draw_batch_size=batch, temperature=1e-4)
        found.append(train.draw(run, prompts))
    (_, few, few_logprobs), (_, many, many_logprobs) = found
    assert [[ids.tolist() for ids in group] for group in few] == [[ids.tolist() for ids in group] for group in many]
    assert [len(group) for group in few] == [GROUP] * 4
    torch.testing.assert_close(few_logprobs, many_logprobs)


def test_the_example_shows_the_prompt_with_its_special_tokens_and_what_the_completion_earned():
    model, processor = make_model()
    rollout = make_rollout(model, processor, ALONE)
    rollout = replace(rollout, advantages=torch.tensor([0.5] * 12), paid=[{"iou": 0.25, "a/b.py:mine": 1.0}] * 12)
    text, earned = train.example(make_run(model, processor, ALONE, []), rollout).rsplit("\n", 1)
    num_images = int((rollout.prompts[0]["input_ids"] == model.config.image_token_id).sum())
    assert f"<|image_pad|> x {num_images} <|vision_end|>the small red circle" in text and text.count("image_pad") == 1
    assert text.endswith(processor.tokenizer.decode(rollout.completions[0][0]))
    assert earned == "reward/iou 0.25  reward/mine 1  advantage 0.5"


# ---- whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["stop", "zero"])
def test_a_failing_reward_stops_the_run_with_its_sample_or_scores_0_and_is_counted(
    checkpoint, scenes, tmp_path, answer, capsys
):
    (tmp_path / "bad.py").write_text("def bad(completion, answer):\n    return 1 / 0 if len(completion) % 2 else 1.0\n")
    more = ["--steps", "2", "--eval_every", "0", "--rewards", f"{tmp_path}/bad.py:bad", "--on_reward_error", answer]
    if answer == "stop":
        with pytest.raises(
            ValueError, match=r"sample train-\d+: .*bad raised ZeroDivisionError.*--on_reward_error zero"
        ):
            run(checkpoint, scenes, tmp_path / "out", *more)
        return
    rows = run(checkpoint, scenes, tmp_path / "out", *more)
    assert [row["reward"] for row in rows] == pytest.approx([1 - row["reward_errors"] / 6 for row in rows])
    assert sum(row["reward_errors"] for row in rows) > 0 and "rewards count 0, the first: " in capsys.readouterr().out


def test_a_run_writes_what_the_documents_list(checkpoint, scenes, tmp_path):
    rows = run(checkpoint, scenes, tmp_path / "out", "--steps", "2", "--eval_every", "1", "--tensorboard")
    out = tmp_path / "out"
    assert [row["step"] for row in rows] == [1, 2]
    glossary = "".join(path.read_text() for path in (HERE / "README.md", *(HERE / "docs").glob("*.md")))
    assert all(f"`{name}`" in glossary or name.startswith("reward/") for name in rows[0]), set(rows[0])
    evaluations = read_rows(out / "eval.jsonl")
    assert [row["step"] for row in evaluations] == [0, 1, 2] and "eval/test/mean_iou" in evaluations[0]
    group = read_rows(out / "completions.jsonl")[0]["group"]
    assert len(group) == 3 and group[0].keys() == {"completion", "rewards", "reward", "advantage"}
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
    run_here(["--resume", str(tmp_path / "cut"), "--steps", "4"])
    cut = read_rows(tmp_path / "cut" / "metrics.jsonl")
    assert only_numbers(cut) == only_numbers(whole)
    assert all(row["grad_norm"] > 0 and row["reward_std"] > 0 for row in whole) and whole[-1]["kl"] > 0
    weights = [tmp_path / name / "checkpoints" / "step-000004" / "model.safetensors" for name in ("whole", "cut")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_resumed_run_keeps_its_options_and_a_second_run_its_own_directory(checkpoint, scenes, tmp_path):
    run(checkpoint, scenes, tmp_path / "out", "--steps", "1", "--eval_every", "0")
    with pytest.raises(ValueError, match="group_size was 3 in the run that is resumed and is 4 now"):
        run_here(["--resume", str(tmp_path / "out"), "--group_size", "4"])
    with pytest.raises(ValueError, match="holds a run"):
        run(checkpoint, scenes, tmp_path / "out", "--steps", "1", "--eval_every", "0")
    with pytest.raises(ValueError, match="no such file"):
        run_here(["--resume", str(tmp_path / "none")])


def test_a_text_task_without_images_trains_and_reports_its_reward(checkpoint, tmp_path):
    lines = [json.dumps({"conversations": [{"value": f"{n} + 1?"}, {"value": str(n + 1)}]}) for n in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:3]))
    run(checkpoint, tmp_path, tmp_path / "out", "--steps", "1", "--rewards", "numeric", "format", "--beta", "0")
    evaluation = read_rows(tmp_path / "out" / "eval.jsonl")[0]
    assert "eval/test/reward" in evaluation and "eval/test/mean_iou" not in evaluation


def test_detection_rewards_train_end_to_end(checkpoint, tmp_path, monkeypatch):
    path = toy.scenes.write_detection_split(tmp_path, "train", 8, seed=1)
    records = [json.loads(line) | {"accu_reward_method": "odLength"} for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, records)))
    toy.scenes.write_detection_split(tmp_path, "test", 3, seed=2)
    real_pay = train.pay

    def spoken(run, prompts, *drawn):
        # An untrained model says nothing readable: let it say the truth every third time, and "None" otherwise.
        texts = [f"<answer>{p.answer if i == 0 else 'None'}</answer>" for p in prompts for i in range(3)]
        monkeypatch.setattr(run.processor.tokenizer, "batch_decode", lambda ids, **options: texts)
        return real_pay(run, prompts, *drawn)

    monkeypatch.setattr(train, "pay", spoken)
    rows = run(checkpoint, tmp_path, tmp_path / "out", "--steps", "3", "--rewards", "iou", "format", "--beta", "0")
    # Each sample's own od_length replaces iou.
    assert all(row["reward/od_length"] >= 1 / 3 and "reward/iou" not in row for row in rows)
    assert max(row["reward_std"] for row in rows) > 0 and max(row["grad_norm"] for row in rows) > 0
    evaluation = read_rows(tmp_path / "out" / "eval.jsonl")[0]
    assert "eval/test/reward" in evaluation


def test_without_evaluation_data_a_twentieth_is_held_out(checkpoint, scenes, tmp_path):
    argv = options(checkpoint, scenes, tmp_path / "out", "--steps", "1")
    place = argv.index("--eval_data")
    run_here(argv[:place] + argv[place + 2 :])
    assert read_rows(tmp_path / "out" / "eval.jsonl")[0]["eval/held_out/samples"] == 1


def test_a_dry_run_prints_what_a_run_would_do_and_draws_eight_samples(checkpoint, scenes, tmp_path, capsys):
    run_here(options(checkpoint, scenes, tmp_path / "out", "--dry_run"))
    text = capsys.readouterr().out
    assert "24 samples; 2 prompts and 6 completions a step; 12.0 steps an epoch; 12 steps" in text
    assert "1,104,672 of 1,104,672 parameters trained" in text and "GB  reference" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples.png"]


def test_a_checkpoint_keeps_the_pixel_budget_it_was_trained_under(checkpoint, scenes, tmp_path):
    run(checkpoint, scenes, tmp_path / "out", "--steps", "1", "--eval_every", "0", "--max_pixels", "2048")
    config = json.loads((tmp_path / "out" / "checkpoints" / "step-000001" / "processor_config.json").read_text())
    assert config["image_processor"]["size"] == {"shortest_edge": 256, "longest_edge": 2048}


def test_a_checkpoint_is_evaluated_under_the_prompt_of_its_run(checkpoint, scenes, tmp_path):
    run(checkpoint, scenes, tmp_path / "out", "--steps", "1", "--eval_every", "0")
    config = EvalConfig(model=str(tmp_path / "out" / "checkpoints" / "step-000001"), data=["d"])
    found, [target] = evaluation.settle(config)
    assert (target.template, found.max_completion_tokens, found.min_pixels) == ("plain", 6, 256)
    assert evaluation.settle(replace(config, template="rec"))[1][0].template == "rec"


def test_torchrun_with_two_processes_trains_and_logs_once(checkpoint, scenes, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE / "train.py")]
    more = ["--steps", "2", "--eval_every", "2", "--freeze_vision", "--gradient_checkpointing", "--draw_sharded"]
    command = [sys.executable, *launcher, *options(checkpoint, scenes, tmp_path / "out", *more)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in read_rows(tmp_path / "out" / "metrics.jsonl")] == [1, 2]
    assert len(list((tmp_path / "out" / "checkpoints" / "step-000002").glob("state-*.training"))) == 2


def test_images_are_opened_once_per_prompt_and_step(checkpoint, scenes, tmp_path, monkeypatch):
    opened = []
    real_open = Image.open
    rows_before = run(checkpoint, scenes, tmp_path / "a", "--steps", "1", "--eval_every", "0")
    monkeypatch.setattr(
        "model.vlm.load_image", lambda path, root: opened.append(path) or real_open(path).convert("RGB")
    )
    rows = run(checkpoint, scenes, tmp_path / "b", "--steps", "1", "--eval_every", "0")
    assert len(opened) == 2 and only_numbers(rows) == only_numbers(rows_before)  # two prompts, six completions


def test_a_frozen_tower_runs_once_per_prompt_and_step_and_changes_nothing(checkpoint, scenes, tmp_path, monkeypatch):
    more = ["--steps", "2", "--eval_every", "0", "--freeze_vision", "--num_iterations", "2"]
    model = make_model()[0]
    if not takes_image_features(model):
        pytest.skip("this version of transformers does not take image features")
    calls, tower = [], type(model.model.visual)
    real = tower.forward
    monkeypatch.setattr(tower, "forward", lambda self, *a, **o: calls.append(1) or real(self, *a, **o))
    once = run(checkpoint, scenes, tmp_path / "a", *more)
    assert len(calls) == 1 + 2 * 2  # the blank prompt, and two prompts in each of two steps
    for module in ("train", "infra.run"):
        monkeypatch.setattr(f"{module}.tower_is_frozen", lambda model: False)
    again = run(checkpoint, scenes, tmp_path / "b", *more)
    for a, b in zip(only_numbers(once), only_numbers(again), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
