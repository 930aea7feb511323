"""attention.py against the dense mask, in float64 and with gradients, and against attention over the joined keys."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import toy
import toy.model
from model import attention, cache
from model.attention import attend_row, merge, row_layout, shared_prefix, use_shared_prefix
from model.cache import GroupCache

CPU = torch.device("cpu")
ROWS = {  # prompt lengths, lengths of each prompt's completions
    "one group": ([7], [[3, 5, 1]]),
    "ragged groups": ([7, 2, 5], [[3, 5, 1], [9], [2, 2]]),
    "prompts alone": ([7, 4], [[], []]),
    "a prompt without completions among others": ([3, 6, 2], [[2, 4], [], [5]]),
    "an empty completion": ([4, 3], [[0, 3], [2]]),
    "one-token prompts": ([1, 1], [[1, 2], [3]]),
    "one long among short ones": ([5], [[17, 1, 2, 1, 3]]),
}


def states(size, heads, key_heads, dtype=torch.float64, head_size=8):
    torch.manual_seed(3)
    shapes = (heads, key_heads, key_heads, heads)
    # transposed as the model's projections leave them: [1, S, heads, D] in memory
    return [torch.randn(1, size, h, head_size, dtype=dtype).transpose(1, 2).requires_grad_() for h in shapes]


def dense(query, key, value, mask, scale):
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_attention_in_parts_and_its_gradients_are_those_of_the_dense_mask(row, heads):
    layout = row_layout(*ROWS[row], CPU)
    query, key, value, grad = states(layout.groups[-1][-1], *heads)
    results = []
    for out in (attend_row(layout, 0, query, key, value, 0.3), dense(query, key, value, layout.mask, 0.3)):
        results.append((out, *torch.autograd.grad(out, (query, key, value), grad)))
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 0.04)])
def test_lower_precisions_stay_as_close_as_the_dense_mask_does(dtype, tolerance):
    layout = row_layout(*ROWS["ragged groups"], CPU)
    exact = states(layout.groups[-1][-1], 4, 2)
    query, key, value, grad = (x.detach().to(dtype).requires_grad_() for x in exact)
    out = attend_row(layout, 0, query, key, value, 0.3)
    expected = dense(*exact[:3], layout.mask, 0.3)
    assert out.dtype == dtype and (out - expected).abs().max() < tolerance
    ours = torch.autograd.grad(out, (query, key, value), grad)
    for a, b in zip(ours, torch.autograd.grad(expected, exact[:3], exact[3]), strict=True):
        assert (a - b).abs().max() < 2 * tolerance


def test_the_mask_shows_a_completion_its_prompt_and_itself_alone():
    mask = row_layout([2, 1], [[1, 2], [1]], CPU).mask[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0],  # prompt of the first group
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],  # its completion of one token
        [1, 1, 0, 1, 0, 0, 0],  # and of two
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],  # the second group
        [0, 0, 0, 0, 0, 1, 1],
    ]


def attend_with_lse(query, key, value, scale):
    scores = scale * query @ key.transpose(2, 3)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def test_parts_merge_into_attention_over_all_keys():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    parts = [attend_with_lse(query, key[:, :, part], value[:, :, part], 0.5) for part in (slice(0, 4), slice(4, 9))]
    out, lse = merge(*parts[0], *parts[1])
    assert_close(out, F.scaled_dot_product_attention(query, key, value, scale=0.5))
    assert_close(lse, (0.5 * query @ key.transpose(2, 3)).logsumexp(-1))


def test_a_cache_that_drops_sequences_attends_as_every_sequence_alone_does():
    torch.manual_seed(0)
    heads, key_heads, size, lengths, group = 4, 2, 8, [5, 3, 6], 2
    prompts = [[torch.randn(2, key_heads, n, size, dtype=torch.float64) for n in lengths] for _ in range(2)]  # layers
    padded = [
        tuple(torch.stack([F.pad(kv[i], (0, 0, 0, 6 - kv.shape[2]), value=9.0) for kv in layer]) for i in (0, 1))
        for layer in prompts
    ]
    cache = GroupCache(dict(enumerate(padded)), lengths, group)
    rows = [(prompt, []) for prompt in range(3) for _ in range(group)]  # (prompt, its own keys and values so far)
    drops = {
        1: [0, 1, 2, 4, 5],
        2: [0, 2, 3, 4],
        70: [1],
    }  # by step; the last leaves the shortest prompt, past a buffer's 64
    for step in range(72):
        if step in drops:
            cache.keep(drops[step])
            rows = [rows[number] for number in drops[step]]
        cache.reserve(step + 1 if step % 2 else 128)  # exact, and with room to spare
        cache.begin()
        new = torch.randn(2, len(rows), heads + 2 * key_heads, 1, size, dtype=torch.float64)
        for layer in range(2):
            query, key, value = new[layer].split([heads, key_heads, key_heads], 1)
            ours = cache.attend(layer, query, key, value, 0.3)
            for number, (prompt, own) in enumerate(rows):
                own.append((layer, torch.stack([key[number], value[number]])))
                seen = torch.cat([prompts[layer][prompt], *(kv for at, kv in own if at == layer)], 2)
                expected = dense(query[number : number + 1], seen[:1], seen[1:], None, 0.3)
                assert_close(ours[number], expected[0], rtol=0, atol=1e-12)
        cache.length += 1


def test_a_model_keeps_its_own_attention_outside_and_plain_calls_are_unchanged():
    model, ids = toy.model.build_model(toy.model.build_processor().tokenizer), torch.randint(10, 150, (2, 12))
    visible = torch.ones_like(ids)
    visible[0, :5] = 0
    expected = model(input_ids=ids, attention_mask=visible).logits
    with shared_prefix(model):
        assert model.config.get_text_config()._attn_implementation == attention.NAME
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    use_shared_prefix(model)
    assert_close(model(input_ids=ids, attention_mask=visible).logits[visible.bool()], expected[visible.bool()])


def test_one_long_completion_does_not_pad_the_short_ones():
    layout = row_layout([4], [[1000] + [5, 6, 7, 4] * 10], CPU)
    assert sum(batch.own.numel() for batch in layout.batches) < 2 * len(layout.places)
    tokens = torch.cat([batch.places for batch in layout.batches])
    assert sorted(tokens.tolist()) == layout.places.tolist() == list(range(4, 4 + len(tokens)))


def test_a_scale_of_the_models_own_is_used_and_what_is_not_computed_is_refused():
    query, key, value, _ = states(6, 4, 2)
    layer = torch.nn.Module()
    layer.layer_idx, layer.num_key_value_groups = 0, 2
    layout = row_layout([6], [[]], CPU)
    attend = partial(attend_row, layout)
    out, _ = attention.shared_prefix_attention(layer, query, key, value, None, attend=attend, scaling=0.9)
    assert_close(out.transpose(1, 2), dense(query, key, value, layout.mask, 0.9))
    out, _ = attention.shared_prefix_attention(layer, query, key, value, None, attend=attend)
    assert_close(out.transpose(1, 2), dense(query, key, value, layout.mask, 8**-0.5))
    with pytest.raises(ValueError, match="sliding_window is not computed here"):
        attention.shared_prefix_attention(layer, query, key, value, None, attend=attend, sliding_window=4)


def test_scores_while_decoding_are_not_rounded_to_bf16():
    torch.manual_seed(0)
    query, key = (torch.randn(1, 2, n, 128).bfloat16() * 4 for n in (3, 50))
    scores = cache._fp32_bmm(query, key.transpose(2, 3))
    expected = query.double() @ key.double().transpose(2, 3)
    assert (scores - expected).abs().max() < 1e-2  # scores near 1,000, which bf16 rounds by up to 4


def test_the_models_attention_comes_back_even_after_an_error():
    model = toy.model.build_model(toy.model.build_processor().tokenizer)
    with pytest.raises(KeyError), shared_prefix(model):
        raise KeyError
    assert model.config.get_text_config()._attn_implementation == "sdpa"


# ---- a GPU's kernels -----------------------------------------------------------------------------------------------


def segments_on_cpu(query, key, value, segments, causal, scale):
    """What a GPU's kernel of segments computes, by plain arithmetic: the output and its log-sum-exp."""
    out, lse = torch.zeros_like(query), query.new_full(query.shape[1::-1], torch.inf)  # +inf: the kernel's own for none
    bounds = zip(segments.query_bounds.tolist(), segments.key_bounds.tolist(), strict=True)
    for (q0, k0), (q1, k1) in pairwise(bounds):
        scores = scale * torch.einsum(
            "qhd,khd->hqk", query[q0:q1], key[k0:k1].repeat_interleave(repeats(query, key), 1)
        )
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
        values = value[k0:k1].repeat_interleave(repeats(query, key), 1)
        out[q0:q1], lse[:, q0:q1] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values), scores.logsumexp(-1)
        assert q1 - q0 <= segments.most_queries and k1 - k0 <= segments.most_keys
    return out, lse


def repeats(query, key):
    return query.shape[1] // key.shape[1]


def segments_backward_on_cpu(grad, query, key, value, out, lse, segments, causal, scale):
    """Its backward as a flash kernel does it, from the output and the log-sum-exp that it is given."""
    grads = [torch.zeros_like(states) for states in (query, key, value)]
    bounds = zip(segments.query_bounds.tolist(), segments.key_bounds.tolist(), strict=True)
    for (q0, k0), (q1, k1) in pairwise(bounds):
        times = repeats(query, key)
        keys, values = (states[k0:k1].repeat_interleave(times, 1) for states in (key, value))
        probs = (scale * torch.einsum("qhd,khd->hqk", query[q0:q1], keys) - lse[:, q0:q1, None]).exp()
        probs = probs.tril() if causal else probs
        delta = (grad[q0:q1] * out[q0:q1]).sum(-1).t()
        of_scores = probs * (torch.einsum("qhd,khd->hqk", grad[q0:q1], values) - delta[..., None]) * scale
        grads[0][q0:q1] = torch.einsum("hqk,khd->qhd", of_scores, keys)
        of_keys = torch.einsum("hqk,qhd->khd", of_scores, query[q0:q1])
        of_values = torch.einsum("hqk,qhd->khd", probs, grad[q0:q1])
        for total, part in zip(grads[1:], (of_keys, of_values), strict=True):
            total[k0:k1] = part.unflatten(1, (-1, times)).sum(2)
    return grads


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_a_gpus_two_calls_and_their_gradients_are_those_of_the_dense_mask(row, heads, monkeypatch):
    monkeypatch.setattr(attention, "_segments_kernel", segments_on_cpu)
    monkeypatch.setattr(attention, "_segments_backward", segments_backward_on_cpu)
    layout = row_layout(*ROWS[row], CPU)
    query, key, value, grad = states(layout.groups[-1][-1], *heads)
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]
    ours = attention._SharedPrefixOnGpu.apply(*rows, layout, 0.3).transpose(0, 1)[None]
    expected = dense(query, key, value, layout.mask, 0.3)
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, (query, key, value), grad)),
        (expected, *torch.autograd.grad(expected, (query, key, value), grad)),
        strict=True,
    ):
        assert_close(a, b, rtol=0, atol=1e-13)


class Calls(TorchDispatchMode):
    """Keeps each operator's arguments by the names of its schema."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = [argument.name for argument in function._schema.arguments]
        self.seen[function.__name__] = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("causal", [True, False])
def test_the_gpu_kernels_get_each_argument_in_its_place(causal):
    """On meta tensors, which have shapes and no values."""
    query = torch.randn(6, 4, 64, dtype=torch.bfloat16, device="meta")
    length = 6 if causal else 9
    key, value = (torch.randn(length, 2, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    bounds = [torch.zeros(3, dtype=torch.int32, device="meta") for _ in range(2)]
    segments = attention.Segments(*bounds, 5, 7)
    with Calls() as calls:
        out, lse = attention._segments_kernel(query, key, value, segments, causal, 0.1)
        grad = torch.empty_like(out)
        grads = attention._segments_backward(grad, query, key, value, out, lse, segments, causal, 0.1)
    forward = calls.seen["_flash_attention_forward.default"]
    backward = calls.seen["_flash_attention_backward.default"]
    for arguments in (forward, backward):
        assert arguments["query"] is query and arguments["key"] is key and arguments["value"] is value
        assert arguments["is_causal"] is causal and arguments["scale"] == 0.1 and arguments["dropout_p"] == 0.0
        assert arguments["cum_seq_q"] is bounds[0] and arguments["cum_seq_k"] is bounds[1]
        assert (arguments["max_q"], arguments["max_k"]) == (5, 7)
    assert backward["grad_out"] is grad and backward["out"] is out and backward["logsumexp"] is lse
    assert lse.shape == (4, 6) and lse.dtype == torch.float32
    assert [g.shape for g in grads] == [query.shape, key.shape, key.shape]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("row", ROWS)
def test_on_a_gpu_in_bf16_attention_in_parts_is_that_of_the_dense_mask(row):
    device = torch.device("cuda")
    layout, exact = row_layout(*ROWS[row], device), row_layout(*ROWS[row], CPU)
    full = states(exact.groups[-1][-1], 4, 2, head_size=128)
    query, key, value, grad = (x.detach().to(device, torch.bfloat16).requires_grad_() for x in full)
    out = attend_row(layout, 0, query, key, value, 128**-0.5)
    expected = dense(*full[:3], exact.mask, 128**-0.5)
    assert (out.cpu() - expected).abs().max() < 0.05
    ours = torch.autograd.grad(out, (query, key, value), grad)
    for a, b in zip(ours, torch.autograd.grad(expected, full[:3], full[3]), strict=True):
        assert (a.cpu() - b).abs().max() < 0.1
