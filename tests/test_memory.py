"""tools/memory.py: sizes are the published ones, and a step needs less on more GPUs and with adapters."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tools import memory


@pytest.mark.parametrize("size, billions", [("3b", 3.75), ("7b", 8.29), ("32b", 33.5), ("72b", 73.4)])
def test_a_model_has_the_published_parameters(size, billions):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(memory.config_of(size))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)


def test_the_table_has_a_row_for_each_way_of_training(capsys):
    memory.main("--sizes 3b --row_tokens 4096".split())
    head, _, *rows = capsys.readouterr().out.splitlines()
    whole, adapters = ([float(cell.split()[0]) for cell in row.split("|")[2:-1]] for row in rows)
    assert "| 16 |" in head and whole == sorted(whole, reverse=True)
    assert all(a < b for a, b in zip(adapters, whole, strict=True))
