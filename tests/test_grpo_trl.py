"""grpo.py beside the loss of TRL, the method of its trainer itself; skipped where TRL is not installed."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from grpo import VARIANTS, grpo_loss

trl = pytest.importorskip("trl")
LOW, HIGH, BETA, LONGEST = 0.1, 0.3, 0.04, 9
NAMES = {"gspo": "grpo"}  # in TRL gspo is grpo with ratios of whole sequences


def trl_loss(variant, logprobs, old, ref, advantages, mask):
    """GRPOTrainer._compute_loss on log-probs that are there already, as one micro-batch of one process."""
    arguments = SimpleNamespace(
        delta=None, use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        steps_per_generation=1,
    )  # fmt: skip
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        args=arguments, accelerator=accelerator, model=SimpleNamespace(training=True),
        beta=0.0 if ref is None else BETA, _metrics={"train": defaultdict(list)}, _entropy_bonus_enabled=False,
        loss_type=NAMES.get(variant, variant), importance_sampling_level="sequence" if variant == "gspo" else "token",
        epsilon_low=LOW, epsilon_high=1 + HIGH if variant == "cispo" else HIGH, max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1, aux_loss_enabled=False, top_entropy_quantile=1.0, use_vllm=False,
        off_policy_mask_threshold=None,
        _get_per_token_logps_and_entropies=lambda *inputs, **options: (logprobs, torch.zeros_like(logprobs), None),
    )  # fmt: skip
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_are_those_of_trl(variant, masked, beta):
    generator = torch.Generator().manual_seed(1)
    logprobs, old, ref = torch.randn(3, 6, 7, generator=generator, dtype=torch.float64) - 2
    advantages = torch.randn(6, generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 2, 7, 5])[:, None]
    if masked:  # as TRL masks the completions that were cut off: none of their tokens, but they still count
        mask = mask & torch.tensor([False, True, True, True, False, True])[:, None]
    logprobs.requires_grad_()
    ref = ref if beta else None
    ours, _ = grpo_loss(logprobs, old, ref, advantages, mask, clip_low=LOW, clip_high=HIGH, beta=beta, variant=variant,
                        max_completion_tokens=LONGEST)  # fmt: skip
    theirs = trl_loss(variant, logprobs, old, ref, advantages, mask)
    assert_close(ours, theirs, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in (ours, theirs)]
    assert_close(*gradients, rtol=0, atol=1e-14)
