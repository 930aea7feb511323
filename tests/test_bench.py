"""tools/bench.py: the ways of a row do the same work, each cell has a process of its own, and the table holds all."""

import os

import pytest
import torch
from transformers import AutoModelForImageTextToText

from infra.options import parse_options
from tools import bench, bench_inputs
from tools.bench import WAYS, BenchConfig, Job

DRAW, LEARN, STEP = (list(WAYS[row]) for row in ("draw", "learn", "step"))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Work on the tiny model; its other fields are replaced by the tests."""
    folder = tmp_path_factory.mktemp("bench")
    bench_inputs.write_model("tiny", folder / "model", "cpu")
    bench_inputs.write_data(bench_inputs.WORKLOADS["tiny"], folder / "tiny.jsonl")
    return Job("learn", "tiny", "ours", str(folder / "model"), folder / "tiny.jsonl", "cpu")


def inputs(job):
    """A cell's function and its argument, as `measure` makes them."""
    way = WAYS[job.row][job.way]
    (work,), _ = bench.inputs_of(job, way)
    return way.run, work


def learned(job):
    run, work = inputs(job)
    logprobs = run(work)
    return logprobs, torch.cat([parameter.grad.flatten() for parameter in work.model.parameters()])


@pytest.mark.parametrize("way", LEARN[1:])
def test_all_ways_of_learning_have_the_same_logprobs_and_gradients(job, way):
    (ours, our_gradient), (theirs, gradient) = learned(job), learned(job._replace(way=way))
    assert ours.shape == (2, 3, 6)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert our_gradient.abs().max() > 0.1
    assert (our_gradient - gradient).abs().max() < 1e-5 * our_gradient.abs().max()


def test_a_hybrid_model_learns_the_same_from_a_packed_row(job, tmp_path):
    bench_inputs.write_model(bench_inputs.HYBRID, tmp_path, "cpu")
    job = job._replace(model=str(tmp_path))
    (ours, our_gradient), (theirs, gradient) = learned(job), learned(job._replace(way="repeated rows"))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert (our_gradient - gradient).norm() < 1e-3 * our_gradient.norm()


def test_only_the_named_ways_are_measured(tmp_path):
    config = BenchConfig(rows=["learn", "head"], ways=["ours"], workloads=["tiny"])
    jobs = bench.plan(config, "a model", tmp_path, "cpu")
    assert [(job.row, job.way) for job in jobs] == [("learn", "ours"), ("head", "ours")]
    with pytest.raises(ValueError, match="ways: 'our' is unknown: choose among ours, generate on repeated prompts"):
        BenchConfig(ways=["our"])
    with pytest.raises(ValueError, match="ways: 'TRL' is unknown: choose among ours, generate"):
        BenchConfig(rows=["draw"], ways=["TRL"])


@pytest.mark.parametrize("way", LEARN)
def test_a_way_of_learning_uses_the_attention_and_the_checkpointing_that_its_name_says(job, way):
    _, work = inputs(job._replace(way=way))
    assert (work.model.config.text_config._attn_implementation == "sdpa") == (way not in ("ours", "ours, checkpointed"))
    assert work.model.training == ("checkpointed" in way)


@pytest.mark.parametrize("way", DRAW)
def test_all_ways_of_drawing_make_the_same_number_of_tokens_without_an_end(job, way):
    run, work = inputs(job._replace(row="draw", way=way))
    drawn = run(work._replace(never=list(range(1000))))  # of 1,024
    assert torch.stack(list(drawn)).shape == (2 * 3, 6)
    assert torch.stack(list(drawn)).min() >= 1000
    assert {work.processor.tokenizer.eos_token_id, work.model.config.image_token_id} <= set(work.never)


def test_a_prompt_has_the_tokens_that_the_workload_says(job):
    _, work = inputs(job)
    assert [len(prompt["input_ids"][0]) for prompt in work.prompts] == [4 * 4 + 24] * 2
    assert all((prompt["input_ids"] == work.model.config.image_token_id).sum() == 16 for prompt in work.prompts)
    assert not torch.equal(work.prompts[0]["input_ids"], work.prompts[1]["input_ids"])


def test_both_ways_from_the_head_have_the_same_gradients():
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(size, 8, generator=generator).requires_grad_() for size in (5, 11))
    ids = torch.tensor([0, 3, 10, 7, 3])
    for ours, theirs in zip(bench.head(states, weight, ids), bench.head(states, weight, ids, plain=True), strict=True):
        assert ours.abs().max() > 0.1 and torch.allclose(ours, theirs, atol=1e-5)


def test_the_named_size_3b_has_the_published_parameters():
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(bench_inputs.build_config("3b"))
    assert sum(p.numel() for p in model.parameters()) == 3_754_622_976  # of Qwen/Qwen2.5-VL-3B-Instruct


@pytest.mark.parametrize("way", STEP)
def test_a_whole_step_is_measured_and_it_is_the_second(job, way, monkeypatch):
    if way.startswith("TRL"):
        pytest.importorskip("trl")
    begun = []
    begin = bench.Meter.on_step_begin
    monkeypatch.setattr(bench.Meter, "on_step_begin", lambda *a, **o: begun.append(1) or begin(*a, **o))
    seconds, growth = bench.measure(job._replace(row="step", way=way))
    assert len(begun) == 2 and seconds > 0 and growth >= 0


def test_the_reward_of_a_step_differs_within_a_group():
    texts = [f"w{number} w{number + 1}" for number in range(100)]
    assert len({bench.any_reward(text, "") for text in texts}) == 100


def test_each_cell_is_measured_in_a_process_of_its_own():
    first, second = (bench.in_fresh_process(os.getpid, device="cpu") for _ in range(2))
    assert len({first, second, os.getpid()}) == 3
    with pytest.raises(ZeroDivisionError):
        bench.in_fresh_process(divmod, 1, 0, device="cpu")


@pytest.fixture
def calls(monkeypatch):
    """The jobs in the order in which they are measured; what they cost is made up."""
    made = []

    def fake(function, *arguments, device):
        if function is not bench.measure:
            return None
        [job] = arguments
        made.append((job.row, job.workload, job.way))
        if job.way.startswith("TRL"):
            raise ModuleNotFoundError("No module named 'trl'\nmore")
        if job.workload == "image" and job.way == "ours, dense mask":
            raise RuntimeError("")
        return {"ours": 2.0}.get(job.way, 30.0) + len(made) % 2, 8.0

    monkeypatch.setattr(bench, "in_fresh_process", fake)
    return made


def run_bench(*argv):
    return bench.main(parse_options(BenchConfig, argv))


def test_the_table_has_a_line_for_every_cell_and_says_why_one_is_empty(calls, capsys):
    assert run_bench("--repeats", "2", "--workloads", "image", "long") == 1  # a way of ours failed
    lines = capsys.readouterr().out.splitlines()
    for row, ways in WAYS.items():
        for workload in ("-",) if row in ("head", "rewards") else ("image", "long"):
            for way in ways:
                assert sum(line.startswith(f"| {row} | {workload} | {way} |") for line in lines) == 1
    assert "| step | long | TRL | not measured (ModuleNotFoundError: No module named 'trl') |  |  |  |" in lines
    assert "| learn | image | ours, dense mask | not measured (RuntimeError: no message) |  |  |  |" in lines
    assert calls.count(("step", "long", "TRL")) == 1  # a cell that failed is not tried again


def test_medians_ratios_and_spread_are_those_of_the_processes(monkeypatch, capsys):
    seconds = {"ours": iter([2.0, 9.0, 1.0]), "log_softmax of all logits": iter([5.0, 4.0, 6.0])}
    megabytes = {"ours": 10.0, "log_softmax of all logits": 1234.0}
    monkeypatch.setattr(
        bench, "in_fresh_process", lambda _, job, *more, device: more or (next(seconds[job.way]), megabytes[job.way])
    )
    assert run_bench("--rows", "head", "--workloads", "tiny", "--repeats", "3") == 0
    out = capsys.readouterr().out
    assert "| head | - | ours | 2.000 (1.000 to 9.000) | 1.0 | 10 | 1.0 |" in out
    assert "| head | - | log_softmax of all logits | 5.000 (4.000 to 6.000) | 2.5 | 1,234 | 123.4 |" in out


def test_the_ways_of_a_row_take_turns(calls):
    run_bench("--rows", "draw", "--repeats", "2")
    assert calls == [("draw", "image", way) for way in DRAW] * 2


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--rows", "nosuch"], "rows: 'nosuch' is unknown"),
        (["--workloads", "nosuch"], "workloads: 'nosuch' is unknown"),
        (["--repeats", "0"], "repeats is 0"),
        (["--model", "./no/such/directory"], "no such directory"),
        (["--device", "tpu"], "tpu"),
        (["--minutes", "3"], "unknown option --minutes"),
    ],
)
def test_a_wrong_option_is_refused_with_its_name(argv, message):
    with pytest.raises(ValueError, match=message):
        parse_options(BenchConfig, argv)
