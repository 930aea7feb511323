"""What the completions of a step tell: figures for the log, and warnings with their likely cause."""

import statistics
from collections.abc import Sequence

from torch import Tensor

from data import VLM_R1_METHODS
from grpo import MAX_LOG_RATIO
from infra.config import TrainConfig
from infra.parallel import World, all_sum
from infra.run import Run
from model.vlm import Prompt
from rewards import first_box

GROUP_FIGURES = ("reward", "reward_std", "groups_equal", "truncated", "unparsed", "completion_tokens")
FILE_FIGURES = ("reward", "groups_equal", "truncated", "unparsed", "completion_tokens")  # also told for each file


def group_figures(
    prompt: Prompt,
    texts: Sequence[str],  # G
    completions: Sequence[Tensor],  # G
    totals: Tensor,  # [G] weighted sums of rewards
    run: Run,
) -> dict[str, float]:
    """The figures of one prompt's completions."""
    if (prompt.sample.reward or run.config.files[prompt.sample.file].measure) in ("iou", "giou"):
        unread = [first_box(text) is None for text in texts]
    else:
        unread = ["<answer>" not in text for text in texts]
    return {
        "reward": float(totals.mean()),
        "reward_std": float(totals.std()),
        "groups_equal": float(totals.max() == totals.min()),
        "truncated": statistics.fmean(int(ids[-1]) not in run.eos_ids for ids in completions),
        "unparsed": statistics.fmean(unread),
        "completion_tokens": statistics.fmean(map(len, completions)),
    }


def reward_key(spec: str) -> str:
    """The name of a reward in the log: a plugin is called by its function."""
    return f"reward/{spec.rsplit(':', 1)[-1]}"


def step_figures(
    groups: Sequence[dict[str, float]],  # of each prompt: group_figures, and reward/NAME of what was paid
    files: Sequence[int],  # the data file of each prompt
    config: TrainConfig,
    world: World,
) -> dict[str, float]:
    """Means over the prompts of all ranks; with several files also over the prompts of each file.

    A reward or a file that no prompt of the step has is left out.
    """
    prefixes = [f"file/{file.name}/" for file in config.files] if len(config.files) > 1 else []
    # Every rank adds up the same keys, whatever its prompts were paid.
    rewards = dict.fromkeys(reward_key(spec) for spec in (*config.reward_names, *VLM_R1_METHODS.values()))
    keys = [*rewards, *GROUP_FIGURES, *(prefix + key for prefix in prefixes for key in FILE_FIGURES)]
    sums, counts = dict.fromkeys(keys, 0.0), dict.fromkeys(keys, 0.0)
    for group, file in zip(groups, files, strict=True):
        told = dict(group)
        if prefixes:
            told |= {prefixes[file] + key: group[key] for key in FILE_FIGURES}
        for key, value in told.items():
            sums[key] += value
            counts[key] += 1
    sums, counts = all_sum(sums, world), all_sum(counts, world)
    shares = {f"{prefix}share": counts[f"{prefix}reward"] / config.prompts_per_step for prefix in prefixes}
    return {key: sums[key] / counts[key] for key in keys if counts[key]} | shares


def speed_figures(run: Run, completion_tokens: float) -> dict[str, float]:
    """Completion tokens of all ranks per second of each phase of the step."""
    tokens = run.config.prompts_per_step * run.config.group_size * completion_tokens
    seconds = {name: value for name, value in run.figures.items() if name.startswith("seconds_")}
    return {name.replace("seconds", "tokens_per_second"): tokens / value for name, value in seconds.items()}


def causes_for_concern(recent: Sequence[dict], config: TrainConfig) -> dict[str, str]:
    """Warnings by their cause, from the figures of the last steps; with several files, for each file."""
    warnings = {}
    for file in config.files:
        prefix, where = (f"file/{file.name}/", f" of {file.name}") if len(config.files) > 1 else ("", "")
        told = [figures for figures in recent if f"{prefix}unparsed" in figures]
        if told:
            names = ("unparsed", "truncated", "groups_equal", "reward")
            means = {name: statistics.fmean(figures[prefix + name] for figures in told) for name in names}
            for cause, text in _file_concerns(means, where, list(file.rewards), config).items():
                warnings[prefix + cause] = text
            if rise := _truncation_rises([figures[f"{prefix}truncated"] for figures in told]):
                warnings[f"{prefix}truncated rises"] = (
                    f"the share of completions{where} that are cut off at {config.max_completion_tokens} tokens rises, "
                    f"{rise}: the rewards do not ask the model to end its answer; the format reward does"
                )
    clamped = statistics.fmean(figures.get("clamped", 0.0) for figures in recent)
    if clamped > 0:
        warnings["clamped"] = (
            f"{clamped:.2%} of the tokens are more than a factor e^{MAX_LOG_RATIO:g} from the policy that drew them or "
            "from the reference, and were clamped there: lower --learning_rate"
        )
    return warnings


def _file_concerns(means: dict[str, float], where: str, rewards: list[str], config: TrainConfig) -> dict[str, str]:
    """Warnings about the completions of one file."""
    warnings = {}
    if means["unparsed"] > 0.9:
        warnings["unparsed"] = (
            f"{means['unparsed']:.0%} of the completions{where} cannot be read: does the template ask for the format "
            f"that the rewards {rewards} read? See completions.jsonl"
        )
    if means["truncated"] > 0.5:
        warnings["truncated"] = (
            f"{means['truncated']:.0%} of the completions{where} are cut off at {config.max_completion_tokens} tokens "
            "and earn little: raise --max_completion_tokens, ask for shorter answers, or choose a format reward that "
            "pays only for an answer that ends"
        )
    if means["groups_equal"] > 0.9 and "unparsed" not in warnings and "truncated" not in warnings:
        warnings["groups_equal"] = (
            f"{means['groups_equal']:.0%} of the groups{where} earn equal rewards ({means['reward']:.3g} on average) "
            "and teach nothing: are the true boxes in pixels of the original image, are the samples too easy or too "
            "hard, is the temperature too low? --dry_run draws the boxes"
        )
    return warnings


def _truncation_rises(shares: Sequence[float]) -> str:
    """The rise of the share of truncated completions in words; "" if it does not rise."""
    half = len(shares) // 2
    if half < 3:
        return ""
    early, late = statistics.fmean(shares[:half]), statistics.fmean(shares[-half:])
    return f"from {early:.0%} to {late:.0%}" if late > early + 0.1 else ""
