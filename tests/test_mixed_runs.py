"""Runs of several data files: shares, templates, rewards and figures of each, in one process and in two."""

import json
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ALONE, make_model, make_run, only_numbers, run_here, set_rank, spawn
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import eval as evaluation
import infra.run
import sft
import toy.model
import toy.scenes
import train
from data import Sample, step_indices
from infra.config import EvalConfig, SftConfig, TrainConfig
from infra.figures import causes_for_concern
from infra.options import parse_options
from infra.prompts import PromptFeed, load_run_samples
from model.vlm import Prompt
from train import group_record, pay, rollout_figures

HERE = Path(__file__).parent.parent
REWARDS = """
def spread(completion, answer):
    return float(sum(completion.encode()) % 7) / 7
def steps(completion, answer):
    return float(len(completion) % 3)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """math.jsonl without images, rec.jsonl with one each, two.jsonl with two each; the rewards of a file; and a mix."""
    root = tmp_path_factory.mktemp("mixed")
    toy.scenes.write_split(root, "rec", 24, seed=1)
    boxed = [json.loads(line) for line in (root / "rec.jsonl").read_text().splitlines()]

    def write(name, questions, answers, images):
        turns = [
            [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
            for q, a in zip(questions, answers, strict=True)
        ]
        records = [{"id": f"{name}-{n}", "conversations": t} for n, t in enumerate(turns)]
        records = [record | ({"image": i} if i else {}) for record, i in zip(records, images, strict=True)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    sums = [f"the left of {n} and {n} above the small red circle" for n in range(22)]
    write("math", sums, ["[1, 2, 3, 4]", *(str(2 * n) for n in range(1, 22))], [None] * 22)
    pairs = [[boxed[n]["image"], boxed[n + 1]["image"]] for n in range(21)]
    write("two", ["<image>the circle<image>above"] * 21, ["left"] * 21, pairs)
    (root / "mine.py").write_text(REWARDS)
    write_mix(root, "mix.json")
    return root


def write_mix(files, name, *changes):
    """A mix of the three files, each with its own template, rewards and share, and what the changes add to each."""
    entries = [
        {"file": "math.jsonl", "template": "plain", "rewards": ["math", "format"], "share": 2},
        {"file": "rec.jsonl", "template": "the {question}", "rewards": ["iou", f"{files}/mine.py:spread"], "share": 1},
        {"file": "two.jsonl", "template": "no_think", "rewards": [f"{files}/mine.py:steps", "format"], "share": 1},
    ]
    for entry, change in zip(entries, changes or [{}] * 3, strict=True):
        entry |= {"file": str(files / entry["file"]), **change}
    (files / name).write_text(json.dumps([{k: v for k, v in entry.items() if v is not None} for entry in entries]))
    return str(files / name)


def options(mix, checkpoint, out, *more):
    """The command line of a run of a mix."""
    return [
        "--model", checkpoint, "--mix", str(mix), "--output_dir", str(out), "--prompts_per_step", "2",
        "--group_size", "3", "--max_completion_tokens", "6", "--min_pixels", "256", "--learning_rate", "1e-3",
        *more,
    ]  # fmt: skip


def parse(files, *more, mix="mix.json"):
    return parse_options(TrainConfig, options(files / mix, "m", "out", *more))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the order -----------------------------------------------------------------------------------------------------


def feed_of(files, config, world=ALONE):
    samples = load_run_samples(config, world).training
    return PromptFeed(samples, toy.model.build_processor(), config, world, files / "bad.jsonl"), samples


def test_without_shares_all_files_are_shuffled_together_as_one(files):
    write_mix(files, "unshared.json", *[{"share": None}] * 3)
    config = replace(parse(files, mix="unshared.json"), prompts_per_step=5)
    feed, samples = feed_of(files, config)
    assert config.shares == []
    for step in range(3):
        expected = step_indices(len(samples), 5, step, config.seed)
        assert [prompt.sample for prompt in feed.take(step)] == [samples[index] for index in expected]


def test_ranks_share_out_a_step_and_a_resumed_run_goes_on_in_it(files):
    config = replace(parse(files), prompts_per_step=5)
    whole, _ = feed_of(files, config)
    steps = [[prompt.sample.id for prompt in whole.take(step)] for step in range(3)]
    for rank in (0, 1):
        part, _ = feed_of(files, config, replace(ALONE, rank=rank, size=2))
        assert [prompt.sample.id for prompt in part.take(2)] == steps[2][rank::2]  # without steps 0 and 1
    assert Counter(id.split("-")[0] for step in steps[:2] for id in step) == {"math": 5, "rec": 3, "two": 2}


# ---- template and rewards of each file -----------------------------------------------------------------------------


def test_each_file_has_its_template_its_boxes_and_its_share_held_out(files):
    config = parse(files)
    feed, samples = feed_of(files, config)
    tokenizer, seen = toy.model.build_processor().tokenizer, {}
    for prompt in feed.take(0) + feed.take(1):
        text = tokenizer.decode(prompt["input_ids"][0])
        seen[prompt.sample.file] = ("Output the final answer in <answer>" in text, "the the " in text)
    assert seen == {0: (False, False), 1: (False, True), 2: (True, False)}
    by_file = [[s for s in samples if s.file == number] for number in range(3)]
    held_out = load_run_samples(config, ALONE).eval_sets
    assert {name: len(part) for name, part in held_out.items()} == {"math": 1, "rec": 1, "two": 1}
    assert [len(part) for part in by_file] == [21, 23, 20]
    numbers = [s for s in (*by_file[0], *held_out["math"]) if s.answer == "[1, 2, 3, 4]"]
    assert [s.has_boxes for s in numbers] == [False] and all(s.has_boxes for s in by_file[1])


def prompt_of(file, answer="[0, 0, 10, 10]", reward=""):
    return Prompt({}, answer, Sample("s", "q", answer, (), reward, file == 1, "here", file=file), None, None)


def scored(files):
    """A run and its rollout of three prompts, of the files 1, 0 and 1, with two completions each."""
    weights = [{"weights": [2, 1]}, {"weights": [1, 0.5]}, {"weights": [1, 1]}]
    write_mix(files, "weighted.json", *weights)
    config = parse(files, "--group_size", "2", "--prompts_per_step", "3", mix="weighted.json")
    box, choice = "<think>x</think><answer>[0, 0, 10, 10]</answer>", "<think>x</think><answer>B</answer>"
    texts = [box, "<answer>no box</answer>", "<think>x</think><answer>12</answer>", "13", choice, "A"]
    prompts = [prompt_of(1), prompt_of(0, "12"), prompt_of(1, "B", "mcq")]
    completions = [[torch.tensor([5, 2]), torch.tensor([5])], [torch.tensor([2])] * 2, [torch.tensor([5, 5, 2])] * 2]
    run = make_run(*make_model(), ALONE, [])
    run.config, run.eos_ids = config, [2]
    run.processor = SimpleNamespace(tokenizer=SimpleNamespace(batch_decode=lambda ids, **options: texts))
    rollout = pay(run, prompts, completions, torch.zeros(6, 3))
    return run, replace(rollout, advantages=rollout.totals)


def test_a_prompt_earns_the_rewards_of_its_file_under_their_weights_and_none_of_the_others(files):
    run, rollout = scored(files)
    assert [spec.rsplit("/", 1)[-1] for spec in run.config.reward_names] == [
        "math", "format", "iou", "mine.py:spread", "mine.py:steps",
    ]  # fmt: skip
    mine, spread = f"{files}/mine.py:spread", [sum(text.encode()) % 7 / 7 for text in rollout.texts]
    assert rollout.paid == [
        {"iou": 1, mine: spread[0]}, {"iou": 0, mine: spread[1]},
        {"math": 1, "format": 1}, {"math": 0, "format": 0},
        {"mcq": 1, mine: spread[4]}, {"mcq": 0, mine: spread[5]},  # its own mcq stands in for iou
    ]  # fmt: skip
    halves = [1 + spread[0] / 2, spread[1] / 2, 2 * 1 + 1, 0, 1 + spread[4] / 2, spread[5] / 2]
    torch.testing.assert_close(rollout.totals, torch.tensor(halves))


def test_figures_are_those_of_the_prompts_that_have_them(files):
    run, rollout = scored(files)
    figures = rollout_figures(run, rollout)
    assert figures["reward/iou"] == 0.5 and figures["reward/math"] == figures["reward/format"] == 0.5
    assert figures["reward/mcq"] == 0.5  # what was paid is named
    assert figures["file/rec/reward"] == pytest.approx(float(rollout.totals[[0, 1, 4, 5]].mean()))
    assert figures["file/math/reward"] == 1.5 and figures["reward"] == pytest.approx(float(rollout.totals.mean()))
    assert (figures["file/rec/share"], figures["file/math/share"]) == pytest.approx((2 / 3, 1 / 3))
    assert (figures["file/rec/truncated"], figures["file/math/truncated"]) == (0.25, 0)
    assert (figures["file/rec/unparsed"], figures["file/math/unparsed"]) == (0.5, 0.5)
    assert (figures["file/rec/completion_tokens"], figures["file/math/completion_tokens"]) == (9 / 4, 1)
    assert figures["completion_tokens"] == pytest.approx(11 / 6)
    assert figures["file/two/share"] == 0 and not {"file/two/reward", "reward/steps"} & figures.keys()
    assert all(math.isfinite(value) for value in figures.values())


def test_a_logged_group_shows_what_its_file_pays(files):
    run, rollout = scored(files)
    record = group_record(run, rollout)
    assert [list(row["rewards"]) for row in record["group"]] == [["iou", f"{files}/mine.py:spread"]] * 2
    json.dumps(record, allow_nan=False)


def test_a_warning_names_the_file_even_where_the_others_are_fine(files):
    config = parse(files)
    fine = {"unparsed": 0.0, "truncated": 0.0, "groups_equal": 0.1, "reward": 0.5}
    figures = {f"file/{name}/{key}": value for name in ("math", "rec") for key, value in fine.items()} | fine
    assert causes_for_concern([figures, fine], config) == {}
    [warning] = causes_for_concern(
        [{**figures, "file/math/unparsed": 1.0}, figures | {"file/math/unparsed": 0.95}], config
    ).values()
    assert "of math cannot be read" in warning and "['math', 'format']" in warning


def test_evaluation_files_take_template_and_reward_of_the_entry_that_names_them(files):
    own = {name: {"eval_file": str(files / f"{name}.jsonl"), "eval_image_root": str(files)} for name in ("math", "two")}
    write_mix(files, "evaluated.json", own["math"], {}, own["two"])
    sets = load_run_samples(parse(files, "--eval_limit", "3", mix="evaluated.json"), ALONE).eval_sets
    assert {name: {s.file for s in part} for name, part in sets.items()} == {"math": {0}, "two": {2}}
    assert [len(part) for part in sets.values()] == [3, 3]


# ---- whole runs ----------------------------------------------------------------------------------------------------


def told(prompts):
    """Completions that are a function of the prompt alone, so that any process draws the same for it."""
    groups = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(int(prompt["input_ids"].sum()) + prompt["input_ids"].shape[1])
        lengths = torch.randint(2, 6, (3,), generator=generator).tolist()
        groups.append([torch.randint(10, 150, (length,), generator=generator) for length in lengths])
    return groups


def fixed_draws(model, prompts, group_size, *, return_logprobs=False, **options):
    groups = told(prompts)
    return (groups, [[torch.zeros(len(ids)) for ids in group] for group in groups]) if return_logprobs else groups


def run_with_fixed_draws(argv, patch):
    """train.main under fixed draws; the gradients of each step are written beside its metrics."""
    gradients, real = [], infra.run.apply_gradients

    def recorded(optimizers, *, finite):
        whole = [p.grad for group in optimizers[0].param_groups for p in group["params"]]
        gradients.append([g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in whole])
        return real(optimizers, finite=finite)

    patch.setattr(train, "sample_completions", fixed_draws)
    patch.setattr(infra.run, "apply_gradients", recorded)
    config = parse_options(TrainConfig, argv)
    train.main(config)
    if os.environ.get("RANK", "0") == "0":
        torch.save(gradients, Path(config.output_dir) / "gradients.pt")


def one_of_two(rank, port, argv):
    set_rank(rank, 2, port)
    run_with_fixed_draws(argv, pytest.MonkeyPatch())


@pytest.fixture(scope="module")
def runs(files, checkpoint, tmp_path_factory):
    """Four steps of the three files in one process and in two: rank 0 has texts alone in each of them."""
    root = tmp_path_factory.mktemp("runs")
    more = ["--steps", "4", "--eval_every", "4", "--beta", "0.04", "--log_completions_every", "1"]
    with pytest.MonkeyPatch.context() as patch:
        run_with_fixed_draws(options(files / "mix.json", checkpoint, root / "one", *more), patch)
    spawn(one_of_two, 2, options(files / "mix.json", checkpoint, root / "two", *more))
    return root


def test_two_processes_train_a_mix_of_files_as_one_does(runs):
    one, two = (lines(runs / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        a, b = only_numbers([a, b])
        assert a.keys() == b.keys() and a == pytest.approx(b, rel=1e-4, abs=1e-6), (a, b)
        exact = [key for key in a if key.startswith(("file/", "reward"))]
        assert {key: a[key] for key in exact} == pytest.approx({key: b[key] for key in exact}, abs=1e-6)
        assert a["file/math/share"] == 0.5 and a["grad_norm"] > 0 and a["reward_std"] > 0
    assert {name for row in one for name in ("rec", "two") if row[f"file/{name}/share"]} == {"rec", "two"}
    weights = [load_file(runs / name / "checkpoints" / "step-000004" / "model.safetensors") for name in ("one", "two")]
    assert max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]) < 1e-5


def test_gradients_of_a_mix_are_exact_though_a_rank_has_texts_alone(runs):
    one, two = (torch.load(runs / name / "gradients.pt") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for step, (a, b) in enumerate(zip(one, two, strict=True)):
        largest = max(gradient.abs().max() for gradient in a)
        assert len(a) == len(b) > 50 and largest > 0
        apart = max((x - y).abs().max() for x, y in zip(a, b, strict=True)) / largest
        assert apart < (1e-5 if step == 0 else 1e-3), (step, apart)  # AdamW widens the rounding of the first


def test_each_file_is_evaluated_as_a_set_alike_in_one_process_and_in_two(runs):
    one, two = (lines(runs / name / "eval.jsonl") for name in ("one", "two"))
    assert [next(key for key in row if key.endswith("samples")) for row in one[:3]] == [
        f"eval/{name}/samples" for name in ("math", "rec", "two")
    ]
    assert "eval/rec/mean_iou" in one[1] and "eval/math/reward" in one[0] and "eval/two/reward" in one[2]
    for a, b in zip(one[:3], two[:3], strict=True):  # before the first step, so to the last digit
        assert a == b
    assert len(one) == len(two) == 6


def test_the_glossary_has_every_figure_of_a_run_of_several_files(runs):
    glossary = "".join(path.read_text() for path in (HERE / "README.md", *(HERE / "docs").glob("*.md")))
    for row in lines(runs / "one" / "metrics.jsonl"):
        for key in row:
            name = "/".join(["file", "NAME", key.split("/")[2]]) if key.startswith("file/") else key
            assert f"`{name}`" in glossary or key.startswith("reward/"), key


def test_a_resumed_run_of_several_files_draws_what_the_whole_one_drew(runs, files, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "sample_completions", fixed_draws)
    more = ["--eval_every", "0", "--log_completions_every", "1"]
    run_here([*options(files / "mix.json", checkpoint, tmp_path / "cut", "--steps", "2"), *more])
    run_here(["--resume", str(tmp_path / "cut"), "--steps", "4"])
    drawn = [[r["id"] for r in lines(path / "completions.jsonl")] for path in (tmp_path / "cut", runs / "one")]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4
    shares = [[{k: v for k, v in r.items() if k.startswith("file/")} for r in lines(path / "metrics.jsonl")]
              for path in (tmp_path / "cut", runs / "one")]  # fmt: skip
    assert shares[0] == shares[1]


def test_a_mix_that_has_changed_since_is_refused_on_resume(files, checkpoint, tmp_path):
    mix = write_mix(files, "changing.json")
    run_here(options(mix, checkpoint, tmp_path / "out", "--steps", "1", "--eval_every", "0"))
    for change in ({"template": "no_think"}, {"rewards": ["math"]}, {"weights": [1, 2]}, {"share": 3}):
        write_mix(files, "changing.json", change, {}, {})
        with pytest.raises(ValueError, match="files was .* in .*step-000001 and is .* now"):
            run_here(["--resume", str(tmp_path / "out"), "--steps", "2"])
    write_mix(files, "changing.json", {"eval_file": str(files / "math.jsonl")}, {}, {})  # evaluation may change
    write_mix(files, "changing.json")
    run_here(["--resume", str(tmp_path / "out"), "--steps", "2", "--mix", mix])


# ---- eval.py and sft.py --------------------------------------------------------------------------------------------


def eval_config(*argv):
    return parse_options(EvalConfig, [str(word) for word in argv])


def test_a_checkpoint_of_several_files_knows_template_and_reward_of_each_by_name(runs, files, capsys):
    model = runs / "one" / "checkpoints" / "step-000004"
    two, math_file, other = (files / f"{name}.jsonl" for name in ("two", "math", "other"))
    _, targets = evaluation.settle(eval_config("--model", model, "--data", two, math_file))
    assert [target.template for target in targets] == ["no_think", "plain"]
    assert [target.measure for target in targets] == [f"{files}/mine.py:steps", "math"]
    with pytest.raises(ValueError, match="other is none of the run's files, math, rec, two, .*--template"):
        evaluation.settle(eval_config("--model", model, "--data", two, other))
    given = ["--template", "base", "--task", "rec"]
    _, targets = evaluation.settle(eval_config("--model", model, "--data", two, other, *given))
    assert [(target.template, target.measure) for target in targets] == [("base", "iou")] * 2
    logged = [row for row in lines(runs / "one" / "eval.jsonl") if row["step"] == 4]
    held_out = load_run_samples(parse(files), ALONE).eval_sets
    capsys.readouterr()
    for number, name in enumerate(("math", "rec", "two")):
        data = [json.loads(line) for line in (files / f"{name}.jsonl").read_text().splitlines()]
        [place] = [int(s.source.rsplit(":", 1)[1]) for s in held_out[name]]
        path = files / "held" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(data[place - 1]))
        evaluation.main(eval_config("--model", model, "--data", path, "--image_root", files))
        printed = json.loads(capsys.readouterr().out)[name]
        assert {f"eval/{name}/{key}": value for key, value in printed.items()} | {"step": 4} == logged[number]


def test_eval_takes_template_and_reward_of_each_file_from_a_mix_and_scores_again(files, checkpoint, tmp_path, capsys):
    mix = [{"file": str(files / "math.jsonl"), "template": "plain", "rewards": ["math"]},
           {"file": "unread.jsonl", "eval_file": str(files / "rec.jsonl"), "image_root": str(files)}]  # fmt: skip
    (tmp_path / "mix.json").write_text(json.dumps(mix))
    evaluation.main(
        eval_config("--model", checkpoint, "--mix", tmp_path / "mix.json", "--template", "base", "--limit", "3",
                    "--max_completion_tokens", "2", "--min_pixels", "256", "--output", tmp_path / "e.json")
    )  # fmt: skip
    written, printed = json.loads((tmp_path / "e.json").read_text()), json.loads(capsys.readouterr().out)
    assert {row["template"] for row in written["rows"]["math"]} == {"plain"}
    assert {row["template"] for row in written["rows"]["rec"]} == {"base"}
    assert "reward" in printed["math"] and "mean_iou" in printed["rec"]
    evaluation.main(eval_config("--predictions", tmp_path / "e.json"))
    assert json.loads(capsys.readouterr().out) == printed


def test_files_of_one_name_are_kept_apart_in_an_evaluation(files, checkpoint, tmp_path, capsys):
    (tmp_path / "math.jsonl").write_bytes((files / "math.jsonl").read_bytes())
    data = [str(files / "math.jsonl"), str(tmp_path / "math.jsonl")]
    more = ["--limit", "2", "--max_completion_tokens", "2", "--task", "text", "--reward", "math"]
    evaluation.main(eval_config("--model", checkpoint, "--data", *data, *more))
    assert list(json.loads(capsys.readouterr().out)) == data


def test_the_baseline_learns_from_several_files_under_their_templates_and_shares(
    files, checkpoint, tmp_path, monkeypatch
):
    taken, real = [], sft.train_step
    monkeypatch.setattr(sft, "train_step", lambda run, prompts: taken.append(prompts) or real(run, prompts))
    argv = options(files / "mix.json", checkpoint, tmp_path / "out", "--steps", "2", "--prompts_per_step", "4")
    place = argv.index("--group_size")
    sft.main(parse_options(SftConfig, argv[:place] + argv[place + 2 :]))
    assert [sorted(prompt.sample.file for prompt in prompts) for prompts in taken] == [[0, 0, 1, 2]] * 2
    sets = [next(iter(row.keys() - {"step"})).split("/")[1] for row in lines(tmp_path / "out" / "eval.jsonl")]
    assert sets == ["math", "rec", "two"] * 2


def test_a_dry_run_says_what_each_file_gives(files, checkpoint, tmp_path, capsys):
    run_here(options(files / "mix.json", checkpoint, tmp_path / "out", "--dry_run", "--steps", "21"))
    text = capsys.readouterr().out
    assert "math: 21 samples, 50.0% of each step, 1.00 passes; template plain, rewards math format" in text
    assert "two: 20 samples, 25.0% of each step, 0.53 passes; template no_think" in text
