"""Files that lift out: each is copied alone, with the files of ours that it imports, and used on a Hugging Face model.

The `use_` functions are not called here. Their source runs in a fresh process whose working directory holds the copy
and nothing else, so each imports what it needs.
"""

import ast
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def small_model():
    """A random Qwen2 of two layers and 50 tokens."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, **heads)
    )


def use_grpo():
    import torch

    from grpo import group_advantages, grpo_loss

    model = small_model()
    ids, mask = torch.randint(50, (4, 9)), torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None]  # a prompt of 3 tokens
    logprobs = model(ids).logits[:, 2:-1].log_softmax(-1).gather(2, ids[:, 3:, None])[..., 0]
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.5]), 4)
    loss, figures = grpo_loss(logprobs, logprobs.detach(), None, advantages, mask, beta=0)
    # On the first pass the ratio is 1, so the gradient is that of the plain policy gradient.
    plain = -(advantages[:, None] * logprobs * mask / mask.sum(1, keepdim=True)).sum() / 4
    expected = torch.autograd.grad(plain, list(model.parameters()), retain_graph=True)
    loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert model.lm_head.weight.grad.any() and figures["clip_high"] == 0


def use_attention():
    from functools import partial

    import torch

    from model.attention import attend_row, no_mask, row_layout, use_shared_prefix

    model, device = small_model().double(), torch.device("cpu")
    layout = row_layout([5], [[3, 4]], device)  # a prompt of 5 tokens with completions of 3 and 4
    row = {
        "input_ids": torch.randint(50, (1, 12)),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8]]),
    }
    dense = model(**row, attention_mask=layout.mask).logits
    use_shared_prefix(model)
    parts = model(**row, attention_mask=no_mask(device), attend=partial(attend_row, layout)).logits
    torch.testing.assert_close(parts, dense, rtol=0, atol=1e-6)  # the layers cast norms and rotary angles to fp32
    second = torch.cat([row["input_ids"][:, :5], row["input_ids"][:, 8:]], 1)  # without `attend` it is a usual call
    torch.testing.assert_close(model(second).logits[:, 5:], parts[:, 8:], rtol=0, atol=1e-6)


def use_logprobs():
    import torch

    from model.logprobs import linear_logprobs

    model = small_model()
    ids = torch.randint(50, (1, 9))
    hidden = model.model(ids).last_hidden_state[0, :-1]
    logprobs, entropies = linear_logprobs(hidden, model.lm_head.weight, ids[0, 1:], chunk=7)
    expected = model(ids).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(logprobs, expected.gather(1, ids[0, 1:, None])[:, 0])
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(1))
    logprobs.sum().backward()
    assert model.lm_head.weight.grad.any() and model.model.embed_tokens.weight.grad.any()


def use_lora():
    import copy
    from pathlib import Path

    import torch

    from model import lora

    model, ids = small_model().eval(), torch.arange(9)[None]
    base, plain = copy.deepcopy(model), model(ids).logits
    lora.add_adapters(model, lora.choose_layers(model, ["q_proj", "v_proj"]), rank=2, alpha=4)
    assert len(lora.adapted_layers(model)) == 2 * 2
    for layer in lora.adapted_layers(model).values():
        layer.lora_B.data.normal_()
    with lora.adapters_off(model):
        assert model(ids).logits.equal(plain)
    adapted = model(ids).logits
    assert (adapted - plain).abs().max() > 1e-3
    trained = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
    lora.save_adapter(Path("."), model, trained, "base")
    lora.load_adapter(base, Path("."))
    assert base(ids).logits.equal(adapted)
    lora.merge_adapters(model)
    assert not lora.adapted_layers(model)
    torch.testing.assert_close(model(ids).logits, adapted)


def imported(path):
    """The files of ours that a file imports, as paths under ROOT."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = [Path(*name.split(".")).with_suffix(".py") for name in sorted(names)]
    return [path for path in paths if (ROOT / path).is_file()]


def copy_with_imports(path, folder):
    if not (folder / path).exists():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
        for other in imported(path):
            copy_with_imports(other, folder)


@pytest.mark.parametrize(
    "path, use",
    [
        ("grpo.py", use_grpo),
        ("model/attention.py", use_attention),
        ("model/logprobs.py", use_logprobs),
        ("model/lora.py", use_lora),
    ],
)
def test_a_file_copied_with_what_it_imports_works_on_a_plain_model(tmp_path, path, use):
    copy_with_imports(path, tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.py")] == [path]  # none needs another of ours
    code = f"{inspect.getsource(small_model)}\n{inspect.getsource(use)}\n{use.__name__}()"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_a_file_imports_is_found_and_copied(tmp_path):
    copy_with_imports("rollout.py", tmp_path)
    copied = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.py")}
    assert copied == {
        "rollout.py", "model/attention.py", "model/cache.py", "model/graphs.py", "model/linear_attention.py",
        "model/logprobs.py", "model/packing.py", "model/sampling.py",
    }  # fmt: skip
