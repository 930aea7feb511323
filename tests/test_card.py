"""tools/card.py runs where there is no GPU, and counts the operations of attention in segments."""

import pytest
import torch

from tools import card
from tools.costs import SEGMENTED, segment_flops


def test_the_command_prints_its_tables(capsys):
    card.main("tiny --sequences 8 --prompts 1 --tokens 3".split())
    out = capsys.readouterr().out
    assert "Qwen2.5-VL tiny" in out and "| 8 | " in out and "| 64 | " in out  # 40 tokens and 8 times 3
    assert "64, checkpointed" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_profile_without_a_gpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        card.main(["tiny", "--profile"])
    assert "torch finds no GPU: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("operator, products", zip(SEGMENTED, (2, 5), strict=True), ids=str)
def test_attention_in_segments_counts_each_pair_of_a_query_and_its_keys(operator, products):
    query, key = torch.zeros(5, 4, 8), torch.zeros(9, 2, 8)
    bounds = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 9])
    before = [query] if products == 2 else [query, query]  # the gradient comes first
    rest = [] if products == 2 else [query, query]  # output and log-sum-exp
    args = (*before, key, key, *rest, *bounds)
    pairs = 2 * 4 + 3 * 5
    assert segment_flops(operator, args) == products * 2 * 4 * 8 * pairs
    assert card.counted(operator)(*args, out_val=None) == segment_flops(operator, args)
