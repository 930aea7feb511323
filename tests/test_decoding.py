"""Decoding: what is drawn depends neither on when the host looks nor on buckets, and a graph is checked before use."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers import make_prompts

import rollout
import toy
from model import graphs
from model.graphs import GraphedStep, Graphs
from rollout import EVERY_TOKEN, ON_GPU, Pace, decode, sample_completions

ENDS = list(range(10, 40))  # a seventh of the vocabulary, so that completions end at different times


@pytest.fixture(scope="module")
def processor():
    return toy.model.build_processor()


@pytest.fixture(scope="module")
def model(processor):
    return toy.model.build_model(processor.tokenizer, seed=3).double()


@pytest.fixture
def draw(model, processor, monkeypatch):
    """Draws 12 completions at a given pace; `record` stands in for the recording of a CUDA graph."""

    def draw(pace, record=None, seed=0, **options):
        monkeypatch.setattr(rollout, "EVERY_TOKEN", pace)
        if record:
            monkeypatch.setattr(rollout, "GraphedStep", partial(GraphedStep, record=record))
            monkeypatch.setattr(rollout, "decode", lambda *args, graphed: decode(*args, graphed=True))
        generator = torch.Generator().manual_seed(seed)
        options = {"eos_ids": ENDS, "max_new_tokens": 40, "generator": generator} | options
        drawn, logprobs = sample_completions(
            model, make_prompts(processor, (1, 2, 0)), 4, return_logprobs=True, **options
        )
        return [ids.tolist() for group in drawn for ids in group], torch.cat([x for group in logprobs for x in group])

    return draw


PACES = [Pace(1, 1), Pace(3, 4), Pace(7, 0), ON_GPU]


@pytest.mark.parametrize("options", [{}, {"top_k": 20, "temperature": 0.7}, {"temperature": 0}], ids=str)
@pytest.mark.parametrize("pace", PACES, ids=str)
def test_what_is_drawn_depends_neither_on_the_pace_nor_on_buckets(draw, pace, options):
    expected, logprobs = draw(EVERY_TOKEN, **options)
    drawn, others = draw(pace, **options)
    assert drawn == expected and len({len(ids) for ids in drawn}) > 1
    torch.testing.assert_close(others, logprobs, rtol=0, atol=1e-6)  # they are kept in fp32


def test_what_a_completion_draws_does_not_depend_on_when_the_others_end(draw):
    longer, _ = draw(EVERY_TOKEN, eos_ids=[])
    for ids, unended in zip(draw(EVERY_TOKEN)[0], longer, strict=True):
        assert ids == unended[: len(ids)]


def test_sizes_are_powers_of_two_on_a_gpu_and_exact_elsewhere():
    assert [ON_GPU.batch(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert [ON_GPU.room(n) for n in (1, 256, 257, 1000)] == [256, 256, 512, 1024]
    assert [EVERY_TOKEN.batch(n) for n in (1, 3)] == [EVERY_TOKEN.room(n) for n in (1, 3)] == [1, 3]


def test_finished_sequences_leave_and_groups_stay_together(draw, model, monkeypatch):
    sizes = []

    def watch(inputs, last):
        sizes.append(len(last))
        return rollout.next_logits(model, inputs, last)

    monkeypatch.setattr(rollout, "decoding_forward", lambda model: watch)
    drawn, _ = draw(Pace(1, 1))
    alive = [sum(len(ids) > step for ids in drawn) for step in range(1, len(sizes) + 1)]
    assert all(n >= a and n < 2 * max(a, 1) * 4 / 3 for n, a in zip(sizes, alive, strict=True))
    assert all(after <= before for before, after in pairwise(sizes)) and {12, 8, 4, 2, 1} >= set(sizes) > {12}


# ---- graphs --------------------------------------------------------------------------------------------------------


class Recorder:
    """Records a step as a CUDA graph does: nothing runs until the replay, which leaves its result in one tensor."""

    def __init__(self, error=0.0):
        self.error, self.recorded, self.replayed = error, 0, 0

    def __call__(self, step):
        self.recorded += 1
        result = torch.empty(0, dtype=torch.float64)

        def replay():
            self.replayed += 1
            logits = step() + self.error
            result.resize_(logits.shape).copy_(logits)

        return replay, result


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """The process as if no graph had been recorded."""
    monkeypatch.setattr(graphs, "GRAPHS", Graphs())


def test_a_recorded_step_draws_the_same_and_is_recorded_once_for_each_size(draw):
    expected, recorder = draw(EVERY_TOKEN)[0], Recorder()
    assert draw(Pace(2, 16), recorder)[0] == expected
    tokens = max(map(len, expected))
    assert 3 <= recorder.recorded < 8 and tokens / 2 < recorder.replayed < tokens + 3
    assert graphs.GRAPHS.usable and graphs.GRAPHS.compared


@pytest.mark.parametrize("error", [1.0, torch.nan])
def test_a_replay_that_differs_is_not_used(draw, error, capsys):
    expected, recorder = draw(EVERY_TOKEN)[0], Recorder(error)
    assert draw(Pace(2, 16), recorder)[0] == expected
    assert recorder.recorded == recorder.replayed == 1 and not graphs.GRAPHS.usable
    assert draw(Pace(2, 16), recorder)[0] == expected and recorder.recorded == 1
    out, err = capsys.readouterr()
    assert (out + err).count("warning: drawing without CUDA graphs, which is slower: replayed logits are off by") == 1


def test_a_step_that_cannot_be_recorded_runs_as_it_is(draw, capsys):
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    assert draw(Pace(2, 16), refuse)[0] == draw(EVERY_TOKEN)[0]
    out, err = capsys.readouterr()
    assert "could not be recorded (operation not permitted when stream is capturing)" in out + err


@pytest.mark.cuda
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_on_a_gpu_a_graph_draws_what_plain_calls_draw(processor, temperature):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = toy.model.build_model(processor.tokenizer, seed=3).to("cuda", torch.bfloat16)
    draw = partial(
        sample_completions, model, make_prompts(processor, (1, 2, 0)), 4, max_new_tokens=300, eos_ids=ENDS[:2],
        temperature=temperature,
    )  # fmt: skip
    recorded = draw(generator=torch.Generator("cuda").manual_seed(0))
    assert graphs.GRAPHS.usable and graphs.GRAPHS.compared
    graphs.GRAPHS.usable = False
    plain = draw(generator=torch.Generator("cuda").manual_seed(0))
    assert [[ids.tolist() for ids in group] for group in recorded] == [[ids.tolist() for ids in g] for g in plain]
