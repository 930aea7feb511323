"""attention.py against the dense mask, in float64 and with gradients, and against attention over the joined keys."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import attention
import toy
from attention import GroupCache, attend_row, merge, row_layout, shared_prefix, use_shared_prefix

CPU = torch.device("cpu")
ROWS = {  # prompt lengths, lengths of each prompt's completions
    "one group": ([7], [[3, 5, 1]]),
    "ragged groups": ([7, 2, 5], [[3, 5, 1], [9], [2, 2]]),
    "prompts alone": ([7, 4], [[], []]),
    "a prompt without completions among others": ([3, 6, 2], [[2, 4], [], [5]]),
    "an empty completion": ([4, 3], [[0, 3], [2]]),
    "one-token prompts": ([1, 1], [[1, 2], [3]]),
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


def test_parts_merge_into_attention_over_all_keys():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    parts = [attention._attend(query, key[:, :, part], value[:, :, part], 0.5) for part in (slice(0, 4), slice(4, 9))]
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
    cache = GroupCache(padded, lengths, group)
    rows = [(prompt, []) for prompt in range(3) for _ in range(group)]  # (prompt, its own keys and values so far)
    drops = {
        1: [0, 1, 2, 4, 5],
        2: [0, 2, 3, 4],
        70: [1],
    }  # by step; the last leaves the shortest prompt, past a buffer's 64
    for step in range(72):
        if step in drops:
            cache.keep(torch.tensor(drops[step]))
            rows = [rows[number] for number in drops[step]]
        cache.advance()
        new = torch.randn(2, len(rows), heads + 2 * key_heads, 1, size, dtype=torch.float64)
        for layer in range(2):
            query, key, value = new[layer].split([heads, key_heads, key_heads], 1)
            ours = cache.attend(layer, query, key, value, 0.3)
            for number, (prompt, own) in enumerate(rows):
                own.append((layer, torch.stack([key[number], value[number]])))
                seen = torch.cat([prompts[layer][prompt], *(kv for at, kv in own if at == layer)], 2)
                expected = dense(query[number : number + 1], seen[:1], seen[1:], None, 0.3)
                assert_close(ours[number], expected[0], rtol=0, atol=1e-12)


def test_a_model_keeps_its_own_attention_outside_and_plain_calls_are_unchanged():
    model, ids = toy.build_model(toy.build_processor().tokenizer), torch.randint(10, 150, (2, 12))
    visible = torch.ones_like(ids)
    visible[0, :5] = 0
    expected = model(input_ids=ids, attention_mask=visible).logits
    with shared_prefix(model):
        assert model.config.get_text_config()._attn_implementation == attention.NAME
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    use_shared_prefix(model)
    assert_close(model(input_ids=ids, attention_mask=visible).logits[visible.bool()], expected[visible.bool()])


def test_the_gpu_kernels_are_called_with_what_they_take():
    """On meta tensors, which have shapes and no values: names, order and shapes of the arguments, nothing more."""
    query, key = (torch.randn(2, h, 6, 64, dtype=torch.bfloat16, device="meta") for h in (3, 1))
    out, lse = attention._kernel(query, key, key, True, 0.1)
    assert out.shape == query.shape and lse.shape == query.shape[:3] and lse.dtype == torch.float32
    grads = attention._kernel_backward(out, query, key, key, out, lse, True, 0.1)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]
