"""bench.py: the ways of a row do the same work, what is needed at least is counted right, and the table runs."""

from dataclasses import replace
from inspect import signature

import pytest
import torch

from model.attention import row_layout
from tools import bench
from tools.bench import WORKLOADS, Config, Workload, build_work, causal_pairs, main, measure

TINY = Config(model="tiny", device="cpu", workloads=["tiny"])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return build_work(TINY, WORKLOADS["tiny"], tmp_path_factory.mktemp("image"))


def fresh(work):
    """The same with a model of its own: some ways change it."""
    model, _ = bench.build_model(TINY, torch.float32)
    return replace(work, model=model)


def learned(way, work):
    own = fresh(work)
    torch.manual_seed(1)
    bench.learn(way, own)
    return torch.cat([p.grad.flatten() for p in own.model.parameters()])


@pytest.mark.parametrize("way", bench.ROWS["learn"][1:])
def test_all_ways_of_learning_have_the_same_gradients(work, way):
    if "once" in way and "mm_encoder_outputs" not in signature(work.model.model.forward).parameters:
        with pytest.raises(ValueError, match="5.23 does"):
            learned(way, work)
        return
    ours, theirs = learned("ours", work), learned(way, work)
    assert ours.abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


@pytest.mark.parametrize("way", bench.ROWS["draw"])
def test_all_ways_of_drawing_make_whole_groups_without_an_end(monkeypatch, work, way):
    drawn, own = [], replace(fresh(work), never=list(range(1000)))  # of 1,024
    real, generate = bench.sample_completions, own.model.generate
    monkeypatch.setattr(bench, "sample_completions", lambda *a, **o: drawn.extend(sum(real(*a, **o), [])))
    length = work.prompts[0]["input_ids"].shape[1]
    monkeypatch.setattr(own.model, "generate", lambda **o: drawn.extend(rows := generate(**o)) or rows)
    bench.draw(way, own)
    assert len(drawn) == 2 * 3
    answers = torch.stack([ids[-6:] for ids in drawn])
    assert [len(ids) for ids in drawn] == [6 if way == "ours" else length + 6] * 6
    assert answers.min() >= 1000


def test_a_prompt_has_the_tokens_that_the_workload_says(work):
    for prompt in work.prompts:
        assert prompt["input_ids"].shape[1] == 4 * 4 + 24
        assert (prompt["input_ids"] == work.model.config.image_token_id).sum() == 16
    assert not torch.equal(work.prompts[0]["input_ids"], work.prompts[1]["input_ids"])


def test_the_named_size_3b_has_the_published_parameters():
    with torch.device("meta"):
        model = bench.AutoModelForImageTextToText.from_config(bench.build_config("3b"))
    assert sum(p.numel() for p in model.parameters()) == 3_754_622_976  # of Qwen/Qwen2.5-VL-3B-Instruct


def test_pairs_are_those_of_the_mask():
    # A prompt of 3: 1 + 2 + 3; each of 2 completions of 2: its prompt twice, itself 1 + 2.
    assert causal_pairs(3, 2, 2) == 6 + 2 * (6 + 3)
    layout = row_layout([5], [[4, 4, 4]], torch.device("cpu"))
    assert causal_pairs(5, 3, 4) == layout.mask.sum()


def test_what_drawing_reads_is_counted_by_hand(work):
    workload = Workload(2, 4, 3, 6)
    # tiny: 2 layers, hidden 64, 4 heads of 16, 2 of them keys, MLP 256, head 1024 x 64; biases are left out
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 256
    weights = 2 * layer + 1024 * 64
    token = 2 * 2 * 2 * 16  # keys and values, layers, key heads, size
    own = 6 * (1 + 2 + 3 + 4 + 5 + 6)  # of six sequences
    assert bench.draw_bytes(work.model, work.prompts, workload) == 4 * (6 * (weights + 2 * 40 * token) + own * token)


def test_what_learning_multiplies_is_counted_by_hand(work):
    workload = Workload(2, 4, 3, 6)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 256
    text = 2 * layer * 2 * (40 + 18) + 1024 * 64 * 2 * 18
    # 64 patches an image: patch embedding 3 * 2 * 14 * 14 inputs, 2 blocks (qkv, proj, MLP), a merger on 16 tokens
    block = 64 * 192 + 64 * 64 + 3 * 64 * 256
    vision = 2 * 64 * (1176 * 64 + 2 * block) + 2 * 16 * (256 * 256 + 256 * 64)
    pairs = 2 * (40 * 41 // 2 + 3 * (6 * 40 + 21))
    attention = pairs * 2 * 64 + 2 * 64 * (64 + 64) * 64  # an image is one window: both blocks see its 64 patches
    assert bench.learn_flops(work.model, work.prompts, workload) == 6 * (text + vision) + 12 * attention


def test_a_share_is_what_is_needed_over_what_the_time_allowed():
    rates, found = {"flops": 100.0, "bytes": 10.0}, {"need": 50.0, "seconds": 2.0}
    assert bench.share("learn/image/ours", found, rates) == "25.0% MFU"
    assert bench.share("draw/image/ours", found, rates) == "250.0% of bandwidth"
    assert bench.share("draw/image/ours", found, {}) == bench.share("head/-/ours", {"seconds": 1.0}, rates) == ""


@pytest.mark.parametrize("way", ["ours", "ours, checkpointed", "TRL", "TRL, checkpointed"])
def test_a_whole_step_is_measured(way):
    if way.startswith("TRL"):
        pytest.importorskip("trl")
    result = measure(replace(TINY, cell=f"step/tiny/{way}"))
    assert result["seconds"] > 0 and result["count"] == 2 * 3 * 6


def test_the_answers_that_need_no_gpu_are_found(work):
    assert "MATH" in bench.sdpa_kernels(TINY, fresh(work))["text"]
    assert float(bench.draw_gap(TINY, fresh(work))["text"].split()[3].rstrip(",")) < 1e-5


def test_flex_attention_reaches_its_kernel_under_sharding_and_checkpointing(work):
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        bench.flex_attention(TINY, fresh(work))
    torch.distributed.destroy_process_group()


def test_a_cell_is_measured_in_a_process_of_its_own_and_killed_in_time():
    assert bench.run_cell(TINY, "rewards/-/ours", 300)["seconds"] > 0
    assert bench.run_cell(TINY, "step/none/ours", 300)["error"].startswith("AttributeError")
    assert bench.run_cell(TINY, "draw/tiny/ours", 0.01)["error"] == "killed after 0 s: the time was over"


def fake(config, cell, seconds):
    if "vision once" in cell or cell.startswith("step"):
        return {"error": "ModuleNotFoundError: No module named 'trl'"}
    if cell.startswith("answers"):
        return {"text": "found"}
    return {"seconds": 30.0 if "repeated" in cell else 2.0, "megabytes": 8.0, "count": 10, "need": 1.0}


def test_the_table_names_every_cell_and_an_empty_ours_is_an_error(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(bench, "run_cell", lambda *a: calls.append(a[1]) or fake(*a))
    with pytest.raises(SystemExit):
        main(replace(TINY, workloads=["image", "long"], repeats=2))
    out = capsys.readouterr().out
    for row, ways in bench.ROWS.items():
        for way in ways:
            assert f"| {row} | {'-' if row in ('head', 'rewards') else 'image'} | {way} |" in out
            assert (f"| {row} | long | {way} |" in out) == (row in ("draw", "learn") and way not in bench.FIRST_ONLY)
    assert "| learn | long | repeated rows | 30.000 (once) | 15.0 | 8 | 1.0 | 0 |  |" in out
    assert "| learn | long | ours | 2.000 (2.000 to 2.000) | 1.0 | 8 | 1.0 | 5 |  |" in out
    assert "step/image/TRL, checkpointed: ModuleNotFoundError: No module named 'trl'" in out
    assert calls.count("learn/long/repeated rows") == 1 and calls.count("learn/long/ours") == 2
    assert calls.index("learn/long/ours") < calls.index("draw/image/generate on repeated prompts")


def test_no_cell_is_started_once_the_minutes_are_over(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(bench, "run_cell", fake)
    main(replace(TINY, rows=["learn"], minutes=2, repeats=1))
    out = capsys.readouterr().out
    assert "| learn | tiny | ours | 2.000 (once) |" in out
    assert "- empty: learn/tiny/ours, dense mask; learn/tiny/repeated rows; " in out and "the time was over" in out


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="nosuch"):
        Config(rows=["nosuch"])
    with pytest.raises(ValueError, match="nosuch"):
        Config(workloads=["nosuch"])
