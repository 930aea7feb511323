"""Several data files in one run: shares, templates, rewards and figures of each, in one process and in two."""

import json
import math
import os
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from helpers import ALONE, CONFIG
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import eval as evaluation
import sft
import toy
import toy.model
import toy.scenes
import train
from data import Sample, mixed_indices, share_out, step_indices
from infra.options import parse_options
from infra.prompts import PromptFeed, load_run_samples
from model.vlm import Prompt
from train import Config, causes_for_concern, group_record, rollout_figures, score_texts, total_rewards

HERE = Path(__file__).parent.parent
REWARDS = """
def spread(completion, answer):
    return float(sum(completion.encode()) % 7) / 7
def steps(completion, answer):
    return float(len(completion) % 3)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """math.jsonl without images, rec.jsonl with one each, two.jsonl with two each; and the rewards of a file."""
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
    return root


def options(files, checkpoint, out, *more):
    """The command line of a run of the three files, each with its own template, rewards and share."""
    return [
        "--model", checkpoint, "--data", *(str(files / f"{name}.jsonl") for name in ("math", "rec", "two")),
        "--file_templates", "plain", "the {question}", "no_think",
        "--file_rewards", "math format", f"iou {files}/mine.py:spread", f"{files}/mine.py:steps format",
        "--file_shares", "2", "1", "1", "--output_dir", str(out), "--prompts_per_step", "2", "--group_size", "3",
        "--max_completion_tokens", "6", "--min_pixels", "256", "--learning_rate", "1e-3",
        *more,
    ]  # fmt: skip


def parse(files, *more):
    return parse_options(Config, options(files, "m", "out", *more), {})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the order -----------------------------------------------------------------------------------------------------


def test_shares_are_given_out_next_to_exactly_and_taken_from_none():
    # By hand, votes 2, 1, 1 over 1, 3, 5, ...: 2 | 1, 1 | 2/3 | 2/5 | 1/3, 1/3 ..., the first file first where equal.
    assert [share_out(total, [2, 1, 1]) for total in range(5)] == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
        [2, 1, 1],
    ]
    generator = np.random.default_rng(0)
    for _ in range(50):
        shares = (10.0 ** generator.uniform(-2, 2, generator.integers(1, 7))).tolist()
        before = [0] * len(shares)
        for total in range(300):
            counts = share_out(total, shares)
            assert sum(counts) == total and all(b <= c <= b + 1 for b, c in zip(before, counts, strict=True))
            quotas = [total * share / sum(shares) for share in shares]
            assert max(abs(c - q) for c, q in zip(counts, quotas, strict=True)) <= (len(shares) + 1) / 2
            before = counts


def test_a_step_holds_the_mix_and_each_file_is_visited_whole_before_it_repeats():
    sizes, taken = [100, 7, 40], []
    for step in range(20):
        indices = mixed_indices(sizes, [0.5, 0.25, 0.25], 16, step, seed=3)
        assert Counter(np.searchsorted([100, 107], indices, side="right").tolist()) == {0: 8, 1: 4, 2: 4}
        taken += indices
    small = [index for index in taken if 100 <= index < 107]  # 80 of a file of 7
    for start in range(0, 77, 7):
        assert sorted(small[start : start + 7]) == list(range(100, 107))
    assert small[:7] != small[7:14]
    large = [index for index in taken if index < 100]
    assert len(set(large[:100])) == 100 and large[:100] != list(range(100))
    both = mixed_indices([9, 9], [1, 1], 18, 0, seed=3)
    assert both[:9] != [index - 9 for index in both[9:]]  # an order for each
    assert mixed_indices(sizes, [0.5, 0.25, 0.25], 16, 5, seed=4) != taken[80:96]


def test_an_odd_mix_comes_out_right_over_the_steps_though_none_holds_it():
    counts = Counter()
    for step in range(70):
        indices = mixed_indices([10, 10, 10], [5, 1, 1], 2, step, seed=0)
        assert len(indices) == 2
        counts.update(index // 10 for index in indices)
    assert counts == {0: 100, 1: 20, 2: 20}


def feed_of(files, config, world=ALONE):
    samples, _ = load_run_samples(config, world)
    return PromptFeed(samples, toy.model.build_processor(), config, world, files / "bad.jsonl", 3), samples


def test_without_shares_all_files_are_shuffled_together_as_one(files):
    config = replace(parse(files), file_shares=[], prompts_per_step=5)
    feed, samples = feed_of(files, config)
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
    held_out = load_run_samples(config, ALONE)[1]
    assert {name: len(part) for name, part in held_out.items()} == {"math": 1, "rec": 1, "two": 1}
    assert [len(part) for part in by_file] == [21, 23, 20]
    numbers = [s for s in (*by_file[0], *held_out["math"]) if s.answer == "[1, 2, 3, 4]"]
    assert [s.has_boxes for s in numbers] == [False] and all(s.has_boxes for s in by_file[1])


def prompt_of(file, answer="[0, 0, 10, 10]", reward=""):
    return Prompt({}, answer, Sample("s", "q", answer, (), reward, file == 1, "here", file=file), None, None)


def scored(files):
    """A rollout of three prompts, of the files 1, 0 and 1, with two completions each; and its run's options."""
    config = parse(
        files, "--group_size", "2", "--file_reward_weights", "2 1", "1 0.5", "1 1", "--prompts_per_step", "3"
    )
    box, choice = "<think>x</think><answer>[0, 0, 10, 10]</answer>", "<think>x</think><answer>B</answer>"
    texts = [box, "<answer>no box</answer>", "<think>x</think><answer>12</answer>", "13", choice, "A"]
    prompts = [prompt_of(1), prompt_of(0, "12"), prompt_of(1, "B", "mcq")]
    rewards, _ = score_texts(texts, prompts, config, torch.device("cpu"))
    completions = [[torch.tensor([5, 2]), torch.tensor([5])], [torch.tensor([2])] * 2, [torch.tensor([5, 5, 2])] * 2]
    totals = total_rewards(rewards, prompts, config)
    return train.Rollout(prompts, completions, torch.zeros(6, 3), texts, rewards, totals, totals), config


def test_a_prompt_earns_the_rewards_of_its_file_under_their_weights_and_none_of_the_others(files):
    rollout, config = scored(files)
    assert [spec.rsplit("/", 1)[-1] for spec in config.all_rewards] == [
        "math", "format", "iou", "mine.py:spread", "mine.py:steps",
    ]  # fmt: skip
    spread = [sum(text.encode()) % 7 / 7 for text in rollout.texts]
    nan = math.nan
    expected = torch.tensor([
        [nan, nan, 1, spread[0], nan], [nan, nan, 0, spread[1], nan],
        [1, 1, nan, nan, nan], [0, 0, nan, nan, nan],
        [nan, nan, 1, spread[4], nan], [nan, nan, 0, spread[5], nan],  # its own mcq stands in for iou
    ])  # fmt: skip
    torch.testing.assert_close(rollout.rewards, expected, equal_nan=True)
    halves = [1 + spread[0] / 2, spread[1] / 2, 2 * 1 + 1, 0, 1 + spread[4] / 2, spread[5] / 2]
    torch.testing.assert_close(rollout.totals, torch.tensor(halves))


def test_figures_are_those_of_the_prompts_that_have_them(files):
    rollout, config = scored(files)
    figures = rollout_figures(rollout, config, ALONE, [2])
    assert figures["reward/iou"] == 0.5 and figures["reward/math"] == figures["reward/format"] == 0.5
    assert figures["file/rec/reward"] == pytest.approx(float(rollout.totals[[0, 1, 4, 5]].mean()))
    assert figures["file/math/reward"] == 1.5 and figures["reward"] == pytest.approx(float(rollout.totals.mean()))
    assert (figures["file/rec/share"], figures["file/math/share"]) == pytest.approx((2 / 3, 1 / 3))
    assert (figures["file/rec/truncated"], figures["file/math/truncated"]) == (0.25, 0)
    assert (figures["file/rec/unparsed"], figures["file/math/unparsed"]) == (0.5, 0.5)
    assert (figures["file/rec/completion_tokens"], figures["file/math/completion_tokens"]) == (9 / 4, 1)
    assert figures["completion_tokens"] == pytest.approx(11 / 6)
    assert figures["file/two/share"] == 0 and not {"file/two/reward", "reward/steps"} & figures.keys()
    assert all(math.isfinite(value) for value in figures.values())


def test_with_one_file_no_figure_is_told_twice():
    rollout = train.Rollout([prompt_of(0)], [[torch.tensor([2])] * 3], torch.zeros(3, 1), ["a", "b", "c"],
                            torch.zeros(3, 2), torch.zeros(3), torch.zeros(3))  # fmt: skip
    assert not [key for key in rollout_figures(rollout, CONFIG, ALONE, [2]) if key.startswith("file/")]


def test_a_logged_group_shows_what_its_file_pays(files):
    rollout, config = scored(files)
    record = group_record(rollout, 0, config)
    assert [list(row["rewards"]) for row in record["group"]] == [["iou", f"{files}/mine.py:spread"]] * 2
    json.dumps(record, allow_nan=False)


def test_a_warning_names_the_file_even_where_the_others_are_fine(files):
    config = parse(files)
    fine = {"unparsed": 0.0, "truncated": 0.0, "groups_equal": 0.1}
    figures = {f"file/{name}/{key}": value for name in ("math", "rec") for key, value in fine.items()} | fine
    assert causes_for_concern([figures, fine], config) == []
    [warning] = causes_for_concern(
        [{**figures, "file/math/unparsed": 1.0}, figures | {"file/math/unparsed": 0.95}], config
    )
    assert "of math cannot be read" in warning and "['math', 'format']" in warning


@pytest.mark.parametrize(
    "argv, reason",
    [
        ("--file_templates plain", "1 file_templates for 3 files"),
        ("--file_templates plain rek plain", "'rek' is unknown"),
        ("--file_rewards iou", "1 file_rewards for 3 files"),
        ("--file_rewards iou math mth", "'mth' is unknown"),
        ("--file_shares 1 2", "2 file_shares for 3 files"),
        ("--file_shares 1 0 2", "file_shares are [1.0, 0.0, 2.0]"),
        ("--file_shares 1 nan 2", "each must be above 0"),
        ("--file_reward_weights 1 2", "2 file_reward_weights for 3 files"),
        ("--file_reward_weights 1 2 3", "'1' for math: one number for each of math format"),
        ("--file_reward_weights a b c", "'a' for math: numbers are expected"),
        ("--reward_weights 1 2", "give --file_reward_weights alone"),
        ("--eval_data a b", "--eval_like"),
        ("--eval_data a b --eval_like rec", "1 eval_like for 2 files"),
        ("--eval_data a --eval_like reck", "'reck' is none of the data files: math, rec, two"),
    ],
)
def test_what_does_not_fit_the_files_is_refused_with_the_value(files, argv, reason):
    with pytest.raises(ValueError, match=".") as error:
        parse(files, *argv.split())
    assert reason in str(error.value)


def test_a_reward_named_twice_is_refused():
    with pytest.raises(ValueError, match="rewards iou iou name one twice"):
        parse_options(Config, ["--model", "m", "--data", "d", "--rewards", "iou", "iou"], {})


def test_evaluation_files_take_template_and_reward_of_the_file_they_are_like(files):
    own = [str(files / f"{name}.jsonl") for name in ("two", "math")]
    config = parse(files, "--eval_data", *own, "--eval_like", "two", "math", "--eval_limit", "3")
    sets = load_run_samples(config, ALONE)[1]
    assert {name: {s.file for s in part} for name, part in sets.items()} == {"two": {2}, "math": {0}}
    same = parse(files, "--eval_data", "a", "b", "c")
    assert same.eval_files == [0, 1, 2]
    known = parse(files, "--eval_data", "val.json", "--eval_like", "two").known_files  # what eval.py finds
    assert known["val"] == known["two"] == {"template": "no_think", "reward": f"{files}/mine.py:steps"}


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
    gradients, real = [], train.apply_gradients

    def recorded(optimizers, norm):
        whole = [p.grad for group in optimizers[0].param_groups for p in group["params"]]
        gradients.append([g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in whole])
        return real(optimizers, norm)

    patch.setattr(train, "sample_completions", fixed_draws)
    patch.setattr(train, "apply_gradients", recorded)
    config = parse_options(Config, argv, {})
    train.main(config)
    if os.environ.get("RANK", "0") == "0":
        torch.save(gradients, Path(config.output_dir) / "gradients.pt")


def one_of_two(rank, port, argv):
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    run_with_fixed_draws(argv, pytest.MonkeyPatch())


@pytest.fixture(scope="module")
def runs(files, checkpoint, tmp_path_factory):
    """Four steps of the three files in one process and in two: rank 0 has texts alone in each of them."""
    root = tmp_path_factory.mktemp("runs")
    more = ["--steps", "4", "--eval_every", "4", "--beta", "0.04", "--log_completions_every", "1"]
    with pytest.MonkeyPatch.context() as patch:
        run_with_fixed_draws(options(files, checkpoint, root / "one", *more), patch)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(one_of_two, (port, options(files, checkpoint, root / "two", *more)), nprocs=2)
    return root


def test_two_processes_train_a_mix_of_files_as_one_does(runs):
    one, two = (lines(runs / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        apart = ("seconds", "tokens_per_second", "memory")
        a, b = ({k: v for k, v in row.items() if not k.startswith(apart)} for row in (a, b))
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
    glossary = (HERE / "README.md").read_text()
    for row in lines(runs / "one" / "metrics.jsonl"):
        for key in row:
            name = "/".join(["file", "NAME", key.split("/")[2]]) if key.startswith("file/") else key
            assert f"`{name}`" in glossary or key.startswith("reward/"), key


def test_a_resumed_run_of_several_files_draws_what_the_whole_one_drew(runs, files, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "sample_completions", fixed_draws)
    more = ["--eval_every", "0", "--log_completions_every", "1"]
    train.main(parse_options(Config, options(files, checkpoint, tmp_path / "cut", "--steps", "2", *more), {}))
    train.main(parse_options(Config, ["--resume", str(tmp_path / "cut"), "--steps", "4"], {}))
    drawn = [[r["id"] for r in lines(path / "completions.jsonl")] for path in (tmp_path / "cut", runs / "one")]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4
    shares = [[{k: v for k, v in r.items() if k.startswith("file/")} for r in lines(path / "metrics.jsonl")]
              for path in (tmp_path / "cut", runs / "one")]  # fmt: skip
    assert shares[0] == shares[1]


# ---- eval.py and sft.py --------------------------------------------------------------------------------------------


def evaluate(*argv):
    return parse_options(evaluation.Config, list(argv), {}, evaluation.run_options)


def test_a_checkpoint_of_several_files_knows_template_and_reward_of_each_by_name(runs, files, capsys):
    model = str(runs / "one" / "checkpoints" / "step-000004")
    two, math_file, other = (str(files / f"{name}.jsonl") for name in ("two", "math", "other"))
    config = evaluate("--model", model, "--data", two, math_file)
    assert config.file_templates == ["no_think", "plain"] and config.measures(2) == [f"{files}/mine.py:steps", "math"]
    with pytest.raises(ValueError, match="other is none of the files of the run, math, rec, two, .*--template"):
        evaluate("--model", model, "--data", two, other)
    config = evaluate("--model", model, "--data", two, other, "--template", "base", "--task", "rec")
    assert config.file_templates == [] and config.template == "base" and config.measures(2) == ["iou", "iou"]
    logged = [row for row in lines(runs / "one" / "eval.jsonl") if row["step"] == 4]
    held_out = load_run_samples(parse(files), ALONE)[1]
    for number, name in enumerate(("math", "rec", "two")):
        data = [json.loads(line) for line in (files / f"{name}.jsonl").read_text().splitlines()]
        [place] = [int(s.source.rsplit(":", 1)[1]) for s in held_out[name]]
        path = files / "held" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(data[place - 1]))
        evaluation.main(evaluate("--model", model, "--data", str(path), "--image_root", str(files)))
        printed = json.loads(capsys.readouterr().out)[name]
        assert {f"eval/{name}/{key}": value for key, value in printed.items()} | {"step": 4} == logged[number]


def test_eval_takes_template_and_task_for_each_file_and_scores_again(files, checkpoint, tmp_path, capsys, monkeypatch):
    data = [str(files / f"{name}.jsonl") for name in ("math", "rec")]
    more = ["--limit", "3", "--max_completion_tokens", "2", "--min_pixels", "256", "--output", str(tmp_path / "e.json")]
    tasks = ["--file_tasks", "math", "rec"]
    evaluation.main(
        evaluate("--model", checkpoint, "--data", *data, "--file_templates", "plain", "base", *tasks, *more)
    )
    written, printed = json.loads((tmp_path / "e.json").read_text()), json.loads(capsys.readouterr().out)
    assert {row["template"] for row in written["rows"]["math"]} == {"plain"}
    assert {row["template"] for row in written["rows"]["rec"]} == {"base"}
    assert "reward" in printed["math"] and "mean_iou" in printed["rec"]
    evaluation.main(evaluate("--model", "none", "--predictions", str(tmp_path / "e.json"), *tasks))
    assert json.loads(capsys.readouterr().out) == printed
    with pytest.raises(ValueError, match="1 file_tasks for 2 files"):
        evaluation.main(evaluate("--model", "none", "--predictions", str(tmp_path / "e.json"), "--file_tasks", "rec"))
    for wrong in (["--file_tasks", "rec"], ["--file_tasks", "rec", "mth"], ["--file_templates", "rec"]):
        with pytest.raises(ValueError, match="1 file_t|'mth' is unknown"):
            evaluate("--model", "m", "--data", *data, *wrong)


def test_files_of_one_name_are_kept_apart_in_an_evaluation(files, checkpoint, tmp_path, capsys):
    (tmp_path / "math.jsonl").write_bytes((files / "math.jsonl").read_bytes())
    data = [str(files / "math.jsonl"), str(tmp_path / "math.jsonl")]
    more = ["--limit", "2", "--max_completion_tokens", "2", "--task", "text", "--reward", "math"]
    evaluation.main(evaluate("--model", checkpoint, "--data", *data, *more))
    assert list(json.loads(capsys.readouterr().out)) == data


def test_the_baseline_learns_from_several_files_under_their_templates_and_shares(
    files, checkpoint, tmp_path, monkeypatch
):
    taken, real = [], sft.train_step
    monkeypatch.setattr(
        sft, "train_step", lambda policy, processor, optimizers, prompts, *rest: taken.append(prompts)
        or real(policy, processor, optimizers, prompts, *rest)
    )  # fmt: skip
    argv = options(files, checkpoint, tmp_path / "out", "--steps", "2", "--prompts_per_step", "4")
    place = argv.index("--group_size")
    sft.main(parse_options(sft.Config, argv[:place] + argv[place + 2 :], {}))
    assert [sorted(prompt.sample.file for prompt in prompts) for prompts in taken] == [[0, 0, 1, 2]] * 2
    sets = [next(iter(row.keys() - {"step"})).split("/")[1] for row in lines(tmp_path / "out" / "eval.jsonl")]
    assert sets == ["math", "rec", "two"] * 2


def test_a_dry_run_says_what_each_file_gives(files, checkpoint, tmp_path, capsys):
    train.main(parse_options(Config, options(files, checkpoint, tmp_path / "out", "--dry_run", "--steps", "21"), {}))
    text = capsys.readouterr().out
    assert "math: 21 samples, 50.0% of each step, 1.00 passes; template plain, rewards math format" in text
    assert "two: 20 samples, 25.0% of each step, 0.53 passes; template no_think" in text
