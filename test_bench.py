"""bench.py: the ways of a row do the same work, and the table runs."""

import math

import pytest
import torch

import bench
from bench import Config, build_model, build_prompt, learn, main


def test_both_ways_of_learning_have_the_same_gradients():
    config = Config(size="tiny", side=4, group_size=3, completion_tokens=5)
    model = build_model("tiny")
    prompt = build_prompt(4, 1024)
    gradients = []
    for way in bench.ROWS["learn"]:
        torch.manual_seed(1)
        model.zero_grad()
        learn(way, model, prompt, config)
        gradients.append([p.grad.clone() for p in model.parameters()])
    largest = max(g.abs().max() for g in gradients[0])
    assert max((a - b).abs().max() for a, b in zip(*gradients, strict=True)) < 1e-5 * largest


def test_every_cell_of_drawing_makes_a_group_of_full_length(monkeypatch):
    drawn = []
    monkeypatch.setattr(bench, "sample_completions", lambda *a, **o: drawn.append(real(*a, **o)))
    real = __import__("rollout").sample_completions
    model, prompt = build_model("tiny"), build_prompt(4, 1024)
    for way in bench.ROWS["draw"][:2]:  # the third fails in transformers 5.17
        bench.draw(way, model, prompt, Config(size="tiny", side=4, group_size=3, completion_tokens=5))
    assert [len(ids) for ids in drawn[0][0]] == [5, 5, 5]


def test_the_table_names_every_row_and_way(monkeypatch, capsys):
    monkeypatch.setattr(
        bench, "run_cell", lambda config, cell: {"seconds": 2.0 if "ours" in cell else 6.0, "megabytes": 1.0}
    )
    main(Config(repeats=2))
    table = capsys.readouterr().out
    assert all(f"| {row} | {way} |" in table for row, ways in bench.ROWS.items() for way in ways)
    assert table.count("| 3.0 |") == 4


def test_a_way_that_transformers_cannot_go_is_left_empty_and_ours_is_an_error():
    config = Config(size="none")
    assert math.isnan(bench.run_cell(config, "learn/repeated rows")["seconds"])
    with pytest.raises(SystemExit, match="learn/ours failed"):
        bench.run_cell(config, "learn/ours")


@pytest.mark.parametrize("cell", ["learn/ours"])
def test_a_cell_is_measured_in_a_process_of_its_own(cell):
    result = bench.run_cell(Config(size="tiny", side=4, group_size=2, completion_tokens=4), cell)
    assert result["seconds"] > 0 and result["megabytes"] >= 0
