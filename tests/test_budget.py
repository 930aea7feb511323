"""--row_tokens auto: the first row is safe by the estimate, later ones fill 90% of what the passes leave."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import ALONE, CONFIG, make_model, make_run

from infra import budget
from infra.budget import LEAST, ON_CPU, RowBudget, estimated_gb, out_of_memory, row_budget, safe_row, tokens_of
from infra.runlog import append_rows

GB = 10**9


class Card:
    """A GPU on which every row needs `constant` bytes and each of its tokens `per_token`."""

    def __init__(self, limit, per_token, constant=0, steady=0):
        self._limit, self.per_token, self.constant, self.steady, self.top = limit, per_token, constant, steady, 0

    def held(self):
        return self.steady

    def peak(self):
        return self.top

    def reset(self):
        self.top = self.steady

    def limit(self):
        return self._limit

    def run(self, tokens, gradients=0):
        self.top = max(self.top, self.steady + gradients + self.constant + self.per_token * tokens)


def row(tokens):
    return SimpleNamespace(
        prompts=[{"input_ids": torch.zeros(1, tokens - 3)}], completions=[[torch.zeros(2), torch.zeros(1)]]
    )


def step(rows, card, tokens):
    """A step whose widest row has that many tokens."""
    chosen = rows.choose()
    rows.begin([row(10), row(tokens)])
    card.run(tokens, rows.gradients)
    rows.end()
    return chosen


def test_the_tokens_of_a_row_are_those_of_prompts_and_completions():
    assert tokens_of(row(12)) == 12


def test_from_the_second_step_on_rows_fill_nine_tenths_of_the_card():
    card = Card(80 * GB, per_token=5_000_000, steady=20 * GB)
    rows = RowBudget(2048, ALONE, gradients=10 * GB, memory=card)
    assert step(rows, card, 2000) == 2048
    card.steady = 30 * GB  # the optimizer's moments are there from now on
    chosen = step(rows, card, 2000)
    assert chosen == int((72 - 30 - 10) * GB / 5_000_000)
    card.run(chosen, rows.gradients)
    assert card.peak() == pytest.approx(0.9 * 80 * GB, rel=0.001)


def test_what_every_row_needs_fades_and_small_rows_show_nothing():
    card = Card(80 * GB, per_token=5_000_000, constant=4 * GB)
    rows = RowBudget(2048, ALONE, memory=card)
    step(rows, card, 2048)
    first = rows.choose()
    for _ in range(12):
        step(rows, card, rows.tokens)
    assert rows.choose() > 1.2 * first
    before = list(rows.needs)
    step(rows, card, 100)
    assert list(rows.needs) == before
    card.run(rows.choose())
    assert card.peak() < 80 * GB


def test_ranks_agree_on_the_least_and_a_rank_without_a_measurement_keeps_in_step(monkeypatch):
    asked = []
    monkeypatch.setattr(
        budget, "all_max", lambda values, world: asked.append(values) or {"least": max(-700, values["least"])}
    )
    rows = RowBudget(2048, ALONE, memory=Card(80 * GB, 1))
    assert rows.choose() == 700 and asked == [{"least": -2048}]


def test_a_row_keeps_within_its_bounds():
    rows = RowBudget(2048, ALONE, memory=Card(80 * GB, 1))
    for need, expected in ((1e12, LEAST), (1.0, budget.MOST)):
        rows.needs.clear()
        rows.needs.append(need)
        assert rows.choose() == expected


def test_the_option_decides_and_a_cpu_keeps_its_default():
    model, _ = make_model()
    assert row_budget(model, ALONE, replace(CONFIG, row_tokens=500), reference=False).choose() == 500
    assert row_budget(model, ALONE, replace(CONFIG, row_tokens="auto"), reference=False).choose() == ON_CPU


def test_the_first_row_on_a_gpu_is_safe_whatever_a_run_took_before_it_was_resumed(monkeypatch, tmp_path):
    model, processor = make_model()
    gpu, config = replace(ALONE, device=torch.device("cuda")), replace(CONFIG, row_tokens="auto")
    monkeypatch.setattr(budget, "DeviceMemory", lambda device: Card(80 * GB, 1))
    append_rows(tmp_path / "metrics.jsonl", [{"step": 1, "row_tokens": 60_000.0, "skipped_updates": 0.0}])
    run = make_run(model, processor, ALONE, [])
    resumed = replace(run, out=tmp_path, config=config, world=gpu).budget
    assert resumed.choose() == ON_CPU
    assert resumed.gradients == sum(4 * p.numel() for p in model.parameters())


def test_a_safe_row_fills_six_tenths_by_the_estimate():
    model, _ = make_model()
    for tokens in (2000, 5000):
        limit = estimated_gb(model, ALONE, CONFIG, False, tokens)["learning"] * 1e9 / budget.SAFE
        assert safe_row(model, ALONE, CONFIG, reference=False, limit=limit) == pytest.approx(tokens, rel=0.1)
    assert safe_row(model, ALONE, CONFIG, reference=False, limit=1) == LEAST


def test_running_out_of_memory_is_told_with_what_to_lower(monkeypatch):
    def estimated(model, world, config, reference, tokens):
        return {"drawing": 30.0, "learning": tokens / (400 if config.gradient_checkpointing else 100)}

    def told(config, tokens):
        return out_of_memory(None, ALONE, config, reference=False, tokens=tokens)

    monkeypatch.setattr(budget, "estimated_gb", estimated)
    text = told(CONFIG, 4000)
    assert "drawing needs 30.0 GB and learning, with rows of 4,000 tokens, 40.0 GB" in text
    assert "Give --row_tokens 2000 (20.0 GB), --gradient_checkpointing (learning: 10.0 GB), lower --max_pixels" in text
    text = told(replace(CONFIG, gradient_checkpointing=True), 16_000)
    assert "--row_tokens 8000" in text and "--gradient_checkpointing" not in text
    assert "Lower --draw_batch_size" in told(CONFIG, 2000)
