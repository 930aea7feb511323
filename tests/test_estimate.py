"""memory.py: rows of every rank, and their budget; the estimate is weighed in test_parallel.py."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from helpers import ALONE, CONFIG, make_model, make_rollout

from infra.memory import draws_sharded, memory_estimate, row_budget
from infra.parallel import World
from model.vlm import blank_prompt
from train import make_rows


def test_a_rank_with_less_to_do_adds_rows_of_a_blank_prompt(monkeypatch):
    model, processor = make_model()
    rollout = make_rollout(model, processor, ALONE)
    monkeypatch.setattr("memory.all_sum", lambda values, world, largest: {"rows": 3.0})  # another rank has three
    rows = make_rows(rollout, CONFIG, World(0, 2, torch.device("cpu"), None), blank_prompt(processor), 4096)
    assert len(rows) == 3 and [len(row.members) for row in rows] == [12, 0, 0]
    assert all(any("pixel_values" in prompt for prompt in row.prompts) for row in rows)


def test_row_tokens_auto_fill_what_memory_leaves_and_start_lower_where_nothing_can_be_repeated(monkeypatch):
    model, _ = make_model()
    config = replace(CONFIG, row_tokens="auto")
    sizes = {}
    for gigabytes in (0.001, 1.0, 2.0, 10_000):
        monkeypatch.setattr("memory.device_memory_gb", lambda device, g=gigabytes: g)
        sizes[gigabytes] = row_budget(config, model, ALONE, reference=False).tokens
    assert sizes[0.001] == 256 and 256 < sizes[1.0] < sizes[2.0] < sizes[10_000] == 65_536
    estimate = memory_estimate(model, ALONE, config, reference=False, row_tokens=sizes[1.0])
    assert 0.85 < sum(estimate.values()) <= 0.9
    monkeypatch.setattr("memory.device_memory_gb", lambda device: 1.0)
    monkeypatch.setattr("memory.all_sum", lambda values, world, largest: values)
    two = row_budget(config, model, World(0, 2, torch.device("cpu"), None), reference=False)
    assert abs(two.tokens - sizes[1.0] / 2) <= 1 and not two.may_shrink


def test_layers_stay_sharded_while_drawing_where_a_whole_copy_beside_the_rest_does_not_fit(monkeypatch):
    model, _ = make_model()
    shards = SimpleNamespace(size=lambda: 2)
    two = World(0, 2, torch.device("cpu"), {"shard": shards})
    terms = memory_estimate(model, two, CONFIG, reference=True, row_tokens=0)
    enough = sum(terms.values()) / 0.9
    assert terms["gathered while drawing"] == 2 * terms["reference"] > 0
    for gigabytes, sharded in ((enough * 1.01, False), (enough * 0.99, True)):
        monkeypatch.setattr("memory.device_memory_gb", lambda device, g=gigabytes: g)
        assert draws_sharded(CONFIG, model, two, reference=True) == sharded
    assert not draws_sharded(replace(CONFIG, draw_sharded=True), model, ALONE, reference=True)
    monkeypatch.setattr("memory.device_memory_gb", lambda device: 1e6)
    assert draws_sharded(replace(CONFIG, draw_sharded=True), model, two, reference=True)
