"""GRPO on a Hugging Face vision-language model; the loop at the end reads like the paper.

`python train.py` trains the toy on whatever machine it is on; with --model, --data and --image_root a real model, one
process per GPU, under VLM-R1's recipe unless told otherwise. The terms of a step:
  draw    G completions of each prompt, from the whole model gathered on every rank
  score   rewards by rule, advantages within the group, log-probs under the reference
  learn   one or more passes of the clipped, KL-penalised loss, a packed row at a time
Left out: several optimizer steps per pass, replay, reward models.

Shapes: B prompts of this rank, G completions each, N = B * G, C tokens of the longest completion.
"""

import math
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import ProcessorMixin
from transformers.hf_argparser import HfArg

import toy
from eval import evaluate_sets
from grpo import MAX_LOG_RATIO, group_advantages, grpo_loss
from infra.memory import RowBudget, draws_sharded, micro_batches, peak_memory_gb, row_budget
from infra.options import RunConfig, Task, check_per_file, compute_dtype, parse_options
from infra.parallel import (
    World,
    all_gather,
    all_sum,
    apply_gradients,
    clip_gradients,
    drawing,
    gradient_scale,
    launch,
    process_group,
)
from infra.prompts import PromptFeed, load_run_samples, sample_record
from infra.run import (
    StopSignal,
    describe_run,
    learning_rate_factor,
    load_policy,
    load_reference,
    make_optimizers,
    seed_step,
    set_learning_rate,
    timed,
    total_steps,
)
from infra.runlog import BadSteps, CheckpointKeeper, RunLog, open_run, read_rows
from model.lora import adapters_off
from model.vlm import Prompt, banned_token_ids, blank_prompt, eos_token_ids, trainable
from rewards import checked_reward, first_box, load_reward
from rollout import completion_logprobs, sample_completions, see_images, stack_groups, tower_is_frozen

GROUP_FIGURES = ("reward", "reward_std", "groups_equal", "truncated", "unparsed", "completion_tokens")
FILE_FIGURES = ("reward", "groups_equal", "truncated", "unparsed", "completion_tokens")  # told for each file too
FIRST_PASS_FIGURES = ("draw_gap", "draw_gap_max", "entropy")
WARN_EVERY = 25  # steps over which a warning looks back, and before which it is not repeated


@dataclass(frozen=True)
class Config(RunConfig):
    rewards: list[str] = HfArg(
        default_factory=lambda: ["iou", "rec_format"],
        help="names, or file.py:function; the first is the accuracy reward, which a sample's own method replaces",
    )
    reward_weights: list[float] = HfArg(default_factory=list, help="weight of each reward; all 1 by default")
    file_reward_weights: list[str] = HfArg(
        default_factory=list, help='their weights, one text for each data file, as "1 0.5" "1 1"; all 1 by default'
    )
    group_size: int = HfArg(default=8, help="completions per prompt")
    num_iterations: int = HfArg(default=1, help="passes, each an optimizer step, over what a step drew")
    clip_low: float = HfArg(default=0.2, help="the ratio is clipped below 1 - this")
    clip_high: float = HfArg(default=0.2, help="and above 1 + this")
    beta: float = HfArg(default=0.04, help="weight of the KL penalty; at 0, and with LoRA, no reference is loaded")
    variant: Literal["grpo", "dapo", "dr_grpo", "gspo"] = HfArg(
        default="grpo", help="how tokens are averaged, see grpo.py"
    )
    scale_advantages: bool = HfArg(default=True, help="divide advantages by the group's standard deviation")
    draw_batch_size: int = HfArg(default=512, help="completions decoded together per process; bounds their cache")
    temperature: float = HfArg(default=1.0, help="of the distribution drawn from and trained")
    top_k: int = HfArg(default=0, help="draw among the k most likely tokens only; 0 for all")
    top_p: float = HfArg(default=1.0, help="draw among the most likely tokens that hold this probability only")
    log_completions_every: int = HfArg(default=10, help="steps between groups written to completions.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        for spec in self.rewards:
            load_reward(spec)
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"{len(self.reward_weights)} reward_weights for {len(self.rewards)} rewards: give one each"
            )
        self._check_rewards_of_files()
        if self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size}: an advantage compares completions, so it must be at least 2"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"temperature is {self.temperature}: equal completions teach nothing, so it must be above 0"
            )
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"top_p is {self.top_p} and top_k {self.top_k}: 0 < top_p <= 1 and top_k >= 0 are expected"
            )
        if self.beta < 0 or not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise ValueError(
                f"beta {self.beta}, clip_low {self.clip_low}, clip_high {self.clip_high}: beta >= 0, "
                "0 < clip_low < 1 and clip_high > 0 are expected"
            )
        for name in ("num_iterations", "log_completions_every", "draw_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    def _check_rewards_of_files(self) -> None:
        check_per_file(self.data, file_reward_weights=self.file_reward_weights)
        if self.reward_weights and (self.file_rewards or self.file_reward_weights):
            raise ValueError(
                f"reward_weights are {self.reward_weights} where each file has its own rewards or weights: give "
                "--file_reward_weights alone"
            )
        tasks = self.tasks_under(self.rewards, [])
        for task in tasks:
            if len(set(task.rewards)) < len(task.rewards):
                raise ValueError(f"rewards {' '.join(task.rewards)} name one twice: give it a weight instead")
        for task, text in zip(tasks, self.file_reward_weights, strict=False):
            try:
                weights = [float(number) for number in text.split()]
            except ValueError as error:
                raise ValueError(f"file_reward_weights {text!r} for {task.name}: numbers are expected") from error
            if len(weights) != len(task.rewards):
                raise ValueError(
                    f"file_reward_weights {text!r} for {task.name}: one number for each of {' '.join(task.rewards)}"
                )

    @property
    def weights(self) -> list[float]:
        return self.reward_weights or [1.0] * len(self.rewards)

    @property
    def tasks(self) -> list[Task]:
        """What is done with each data file."""
        own = [[float(number) for number in text.split()] for text in self.file_reward_weights]
        return self.tasks_under(self.rewards, own or ([] if self.file_rewards else [self.weights] * len(self.data)))

    @property
    def all_rewards(self) -> list[str]:
        """The rewards of all files, each once: the columns of Rollout.rewards."""
        return list(dict.fromkeys(spec for task in self.tasks for spec in task.rewards))


@dataclass(frozen=True)
class Rollout:
    prompts: list[Prompt]  # B
    completions: list[list[Tensor]]  # B lists of G id tensors
    draw_logprobs: Tensor  # [N, C] as drawn
    texts: list[str]  # N
    rewards: Tensor  # [N, number of config.all_rewards], NaN where the file of the prompt has not that reward
    totals: Tensor  # [N] their weighted sum
    advantages: Tensor  # [N]
    reward_errors: Sequence[str] = ()  # a line for each reward that gave no number and counts 0
    suspects: Sequence[int] = ()  # prompts of a step without a finite update


@dataclass(frozen=True)
class Row:
    prompts: list[Prompt]  # in this packed row
    completions: list[list[Tensor]]  # and their completions in it
    members: Tensor  # [n] which of the N they are
    mask: Tensor  # [n, C] bool, C of this row


def score_texts(
    texts: Sequence[str], prompts: Sequence[Prompt], config: Config, device: torch.device
) -> tuple[Tensor, list[str]]:
    """Rewards [N, number of config.all_rewards], and a line for each that gave no number and counts 0.

    A prompt earns those of its file, NaN stands for the others; a sample's own method replaces the first.
    """
    tasks, names = config.tasks, config.all_rewards
    rows, errors = [], []
    for number, text in enumerate(texts):
        prompt = prompts[number // config.group_size]
        sample, specs = prompt.sample, tasks[prompt.sample.file].rewards
        earned = {}
        for name, spec in zip(specs, (sample.reward or specs[0], *specs[1:]), strict=True):
            earned[name], reason = checked_reward(spec, text, prompt.answer, config.reward_seconds)
            if reason:
                errors.append(f"{sample.source} ({sample.id}): reward {spec} {reason}, for {text[:200]!r}")
        rows.append([earned.get(name, math.nan) for name in names])
    return torch.tensor(rows, dtype=torch.float32, device=device).view(-1, len(names)), errors


def total_rewards(
    rewards: Tensor,  # [N, number of config.all_rewards]
    prompts: Sequence[Prompt],
    config: Config,
) -> Tensor:
    """Their sums [N] under the weights of each prompt's file."""
    names = config.all_rewards
    weights = [dict(zip(task.rewards, task.weights, strict=True)) for task in config.tasks]
    table = torch.tensor([[of_file.get(name, 0.0) for name in names] for of_file in weights], device=rewards.device)
    files = torch.tensor([prompt.sample.file for prompt in prompts], device=rewards.device)
    return (rewards.nan_to_num() * table[files].repeat_interleave(config.group_size, 0)).sum(1)


def answer_reward_errors(rollout: Rollout, config: Config, world: World) -> None:
    """Stops all ranks together with the sample named, or warns, where a reward of any rank gave no number."""
    count = all_sum({"errors": float(len(rollout.reward_errors))}, world)["errors"]
    if not count:
        return
    first = all_gather(list(rollout.reward_errors[:1]), world)[0]
    if config.on_reward_error == "stop":
        raise ValueError(
            f"{first}; {count:.0f} completions of this step have none: mend the reward, or let such completions score "
            "0 with --on_reward_error zero"
        )
    if world.first:
        tqdm.write(f"warning: {count:.0f} completions score 0, the first: {first}")


def roll_out(
    policy: nn.Module,
    processor: ProcessorMixin,
    prompts: list[Prompt],
    config: Config,
    world: World,
    *,
    generator: torch.Generator,
    eos_ids: list[int],
    banned_ids: list[int],
) -> Rollout:
    """Draws a group for each prompt and scores it."""
    completions, logprobs = [], []
    batch = max(1, config.draw_batch_size // config.group_size)
    with drawing(policy, world):
        if tower_is_frozen(policy):
            prompts = [replace(prompt, inputs=see_images(policy, prompt)) for prompt in prompts]
        for start in range(0, len(prompts), batch):
            drawn = sample_completions(
                policy,
                prompts[start : start + batch],
                config.group_size,
                max_new_tokens=config.max_completion_tokens,
                eos_ids=eos_ids,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                banned_ids=banned_ids,
                generator=generator,
                return_logprobs=True,
            )
            completions += drawn[0]
            logprobs += drawn[1]
    flat = [ids for group in completions for ids in group]
    texts = processor.tokenizer.batch_decode(flat, skip_special_tokens=True)
    rewards, errors = score_texts(texts, prompts, config, flat[0].device)
    totals = total_rewards(rewards, prompts, config)
    padded = pad_sequence([values for group in logprobs for values in group], batch_first=True)
    advantages = group_advantages(totals, config.group_size, scale=config.scale_advantages)
    return Rollout(prompts, completions, padded, texts, rewards, totals, advantages, errors)


def make_rows(rollout: Rollout, config: Config, world: World, blank: Prompt, row_tokens: int) -> list[Row]:
    """The rollout cut into packed rows; a group that teaches nothing (equal rewards and no KL penalty) is left out."""
    groups = rollout.advantages.view(-1, config.group_size)
    taught = [n for n, teaches in enumerate((groups != 0).any(1).tolist()) if teaches or config.beta > 0]
    rows = []
    for prompts, completions, places in micro_batches(
        [rollout.prompts[n] for n in taught], [rollout.completions[n] for n in taught], row_tokens, world, blank
    ):
        members = [taught[number] * config.group_size + index for number, index in places]
        sizes = torch.tensor([len(ids) for group in completions for ids in group], device=world.device)
        mask = torch.arange(int(sizes.max()) if len(sizes) else 0, device=world.device) < sizes[:, None]
        rows.append(Row(prompts, completions, torch.tensor(members, dtype=torch.long, device=world.device), mask))
    return rows


def score_row(model: nn.Module, row: Row, config: Config, banned_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [n, C] of a row's completions under the distribution that was drawn from."""
    logprobs, entropies = completion_logprobs(
        model,
        row.prompts,
        row.completions,
        temperature=config.temperature,
        banned_ids=banned_ids,
        return_entropies=True,
    )
    return stack_groups(logprobs), stack_groups(entropies)


@torch.no_grad()
def score_rollout(model: nn.Module, rollout: Rollout, rows: list[Row], config: Config, banned_ids: list[int]) -> Tensor:
    """Log-probs [N, C] of all that was drawn, under the reference."""
    logprobs = torch.zeros_like(rollout.draw_logprobs)
    for row in rows:
        logprobs[row.members, : row.mask.shape[1]] = score_row(model, row, config, banned_ids)[0]
    return logprobs


def learn(
    policy: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    rollout: Rollout,
    ref: Tensor | None,  # [N, C] log-probs under the reference; None when beta is 0
    config: Config,
    world: World,
    blank: Prompt,
    banned_ids: list[int],
    budget: RowBudget,
) -> dict[str, float]:
    """num_iterations passes of the loss over the rollout, an optimizer step each; their figures, summed over ranks.

    The first pass runs on the weights that drew, so its log-probs are the old ones of all passes: no extra forward.
    """
    drawn = sum(len(ids) for group in rollout.completions for ids in group)
    num_tokens = all_sum({"tokens": float(drawn)}, world)["tokens"]
    old, sums = None, defaultdict(float)
    policy.train()
    for _ in range(config.num_iterations):

        def attempt(row_tokens: int, old=old) -> tuple[Tensor, dict]:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)  # of an attempt that ran out of memory
            rows = make_rows(rollout, config, world, blank, row_tokens)
            return learn_pass(policy, rollout, rows, old, ref, config, world, banned_ids, num_tokens)

        logprobs, figures = budget.attempt(attempt)
        old = logprobs if old is None else old
        for name, value in figures.items():
            sums[name] += value / (1 if name in FIRST_PASS_FIGURES else config.num_iterations)
        loss = all_sum({"loss": float(figures["loss"])}, world)["loss"]
        norm = clip_gradients([parameter for _, parameter in trainable(policy)], config.max_grad_norm)
        taken = apply_gradients(optimizers, norm if math.isfinite(loss) else math.nan)
        sums["skipped_updates"] += float(not taken) / world.size
    largest = all_sum({"draw_gap_max": float(sums.pop("draw_gap_max"))}, world, largest=True)
    return {**all_sum({name: float(value) for name, value in sums.items()}, world), **largest, "grad_norm": norm}


def learn_pass(
    policy: nn.Module,
    rollout: Rollout,
    rows: list[Row],
    old: Tensor | None,  # [N, C] log-probs of the first pass; None if this is it
    ref: Tensor | None,
    config: Config,
    world: World,
    banned_ids: list[int],
    num_tokens: float,  # of all completions of the step, on all ranks
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adds the loss's gradient to the policy's, row by row; returns the log-probs [N, C] and this rank's figures."""
    options = {
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        "beta": config.beta,
        "variant": config.variant,
        "max_completion_tokens": config.max_completion_tokens,
        "num_completions": config.prompts_per_step * config.group_size,
        "num_tokens": num_tokens,
    }
    seen = torch.zeros_like(rollout.draw_logprobs)
    num_scored = all_sum({"tokens": float(sum(row.mask.sum() for row in rows))}, world)["tokens"] or 1.0
    gap_max = torch.zeros((), device=world.device)
    sums = dict.fromkeys(("loss", "kl", "clamped", "clip_low", "clip_high", "draw_gap", "entropy"), gap_max)
    for row in rows:
        place = (row.members, slice(row.mask.shape[1]))
        logprobs, entropies = score_row(policy, row, config, banned_ids)
        seen[place] = logprobs.detach()
        row_old = logprobs.detach() if old is None else old[place]
        row_ref = None if ref is None else ref[place]
        loss, figures = grpo_loss(logprobs, row_old, row_ref, rollout.advantages[row.members], row.mask, **options)
        (loss * gradient_scale(world)).backward()
        for name, value in {"loss": loss.detach(), **figures}.items():
            sums[name] = sums[name] + value  # tensors: a float here would wait for the device
        if old is None:
            gap = (rollout.draw_logprobs[place] - row_old).abs() * row.mask
            gap_max = torch.cat([gap.flatten(), gap_max.view(1)]).amax()  # a blank row has no gap at all
            sums["draw_gap"] = sums["draw_gap"] + gap.sum() / num_scored
            sums["entropy"] = sums["entropy"] + (entropies.detach() * row.mask).sum() / num_scored
    return seen, {**sums, "draw_gap_max": gap_max}


def suspects_of(logprobs: Tensor, rollout: Rollout, config: Config, world: World) -> list[int]:
    """Which prompts of this rank spoilt a step: those with a log-prob (of `logprobs`, [N, C]) or an advantage that is
    not finite; all where no rank has one, since it was a sum that overflowed.
    """
    good = logprobs.isfinite().all(1) & rollout.draw_logprobs.isfinite().all(1) & rollout.advantages.isfinite()
    found = (~good).view(-1, config.group_size).any(1).nonzero().flatten().tolist()
    anywhere = all_sum({"found": float(len(found))}, world)["found"]
    return found if anywhere else list(range(len(rollout.prompts)))


def rollout_figures(rollout: Rollout, config: Config, world: World, eos_ids: list[int]) -> dict[str, float]:
    """What the drawn completions tell, averaged over the step; with several files also over the prompts of each.

    A file or a reward that no prompt of the step has is left out.
    """
    tasks, size = config.tasks, config.group_size
    names = [f"reward/{spec.rsplit(':', 1)[-1]}" for spec in config.all_rewards]
    files = [f"file/{task.name}/" for task in tasks] if len(tasks) > 1 else []
    keys = [*names, *GROUP_FIGURES, *(f"{file}{key}" for file in files for key in FILE_FIGURES)]
    sums, counts = dict.fromkeys(keys, 0.0), dict.fromkeys(keys, 0.0)
    totals = rollout.totals.cpu()
    earned = rollout.rewards.view(-1, size, len(names)).mean(1).tolist()  # NaN again for what the file does not pay
    for number, prompt in enumerate(rollout.prompts):
        place, task = slice(number * size, (number + 1) * size), tasks[prompt.sample.file]
        told = group_figures(
            rollout.texts[place],
            rollout.completions[number],
            totals[place],
            eos_ids,
            one_box=(prompt.sample.reward or task.rewards[0]) in ("iou", "giou"),
        )
        told |= {name: value for name, value in zip(names, earned[number], strict=True) if not math.isnan(value)}
        told |= {f"{files[prompt.sample.file]}{key}": told[key] for key in FILE_FIGURES} if files else {}
        for key, value in told.items():
            sums[key], counts[key] = sums[key] + value, counts[key] + 1
    sums, counts = all_sum(sums, world), all_sum(counts, world)
    shares = {f"{file}share": counts[f"{file}reward"] / config.prompts_per_step for file in files}
    errors = all_sum({"reward_errors": float(len(rollout.reward_errors))}, world)
    return {key: sums[key] / counts[key] for key in keys if counts[key]} | shares | errors


def group_figures(
    texts: list[str],
    completions: list[Tensor],
    totals: Tensor,  # [G]
    eos_ids: list[int],
    *,
    one_box: bool,  # whether a readable answer is a box
) -> dict[str, float]:
    """What the completions of one prompt tell: GROUP_FIGURES."""
    unread = [first_box(text) is None if one_box else "<answer>" not in text for text in texts]
    return {
        "reward": float(totals.mean()),
        "reward_std": float(totals.std()),
        "groups_equal": float(totals.max() == totals.min()),
        "truncated": statistics.fmean(int(ids[-1]) not in eos_ids for ids in completions),
        "unparsed": statistics.fmean(unread),
        "completion_tokens": statistics.fmean(map(len, completions)),
    }


def causes_for_concern(recent: Sequence[dict], config: Config) -> list[str]:
    """Warnings with the likely cause, from the figures of the last steps; with several files, about each."""
    warnings = []
    for task in config.tasks:
        prefix, where = (f"file/{task.name}/", f" of {task.name}") if len(config.tasks) > 1 else ("", "")
        names = ("unparsed", "truncated", "groups_equal")
        told = [[figures[prefix + name] for name in names] for figures in recent if f"{prefix}unparsed" in figures]
        if not told:  # the file gave nothing
            continue
        unparsed, truncated, groups_equal = map(statistics.fmean, zip(*told, strict=True))
        if unparsed > 0.9:
            warnings.append(
                f"{unparsed:.0%} of the completions{where} cannot be read: does the template ask for the format that "
                f"the rewards {list(task.rewards)} read? See completions.jsonl"
            )
        if truncated > 0.5:
            warnings.append(
                f"{truncated:.0%} of the completions{where} are cut off at {config.max_completion_tokens} tokens and "
                "earn little: raise --max_completion_tokens, or ask for shorter answers"
            )
        if groups_equal > 0.9 and unparsed < 0.1:
            warnings.append(
                f"{groups_equal:.0%} of the groups{where} have equal rewards and teach nothing, though the format is "
                "there: is the truth in the space the model answers in, are the samples too easy or too hard?"
            )
    clamped = statistics.fmean(figures.get("clamped", 0.0) for figures in recent)
    if clamped > 0:
        warnings.append(
            f"{clamped:.2%} of the tokens are more than a factor e^{MAX_LOG_RATIO:g} from the policy that drew them or "
            "from the reference, and were clamped there: lower --learning_rate"
        )
    return warnings


def train_step(
    step: int,
    policy: nn.Module,
    reference: nn.Module | None,
    processor: ProcessorMixin,
    optimizers: list,
    feed: PromptFeed,
    blank: Prompt,
    budget: RowBudget,
    config: Config,
    world: World,
    ids: dict[str, list[int]],  # eos_ids and banned_ids
) -> tuple[dict[str, float], Rollout]:
    """One step of the algorithm: draw, score, learn; its figures and what was drawn."""
    generator = seed_step(config, step, world)
    prompts = feed.take(step)
    with timed("draw", world) as draw:
        rollout = roll_out(policy, processor, prompts, config, world, generator=generator, **ids)
    answer_reward_errors(rollout, config, world)
    banned = ids["banned_ids"]
    with timed("score", world) as score:
        with adapters_off(policy):  # with LoRA, that is the reference
            ref = reference and budget.attempt(
                lambda tokens: score_rollout(
                    reference, rollout, make_rows(rollout, config, world, blank, tokens), config, banned
                )
            )
    with timed("learn", world) as learning:
        figures = learn(policy, optimizers, rollout, ref, config, world, blank, banned, budget)
    if figures["skipped_updates"]:  # the weights are as they were, so the log-probs can be asked for again
        rows = make_rows(rollout, config, world, blank, budget.tokens)
        logprobs = score_rollout(policy, rollout, rows, config, banned)
        rollout = replace(rollout, suspects=suspects_of(logprobs, rollout, config, world))
    seconds = {**draw, **score, **learning}
    drawn = rollout_figures(rollout, config, world, ids["eos_ids"])
    tokens = config.prompts_per_step * config.group_size * drawn["completion_tokens"]
    speed = {f"tokens_per_second_{name.removeprefix('seconds_')}": tokens / value for name, value in seconds.items()}
    return {
        **drawn,
        **figures,
        **seconds,
        **speed,
        "row_tokens": budget.tokens,
        "memory_gb": peak_memory_gb(world.device),
    }, rollout


def group_record(rollout: Rollout, number: int, config: Config) -> dict:
    """A group of the step with all that it earned, for completions.jsonl and bad_steps.jsonl."""
    group, prompt = slice(number * config.group_size, (number + 1) * config.group_size), rollout.prompts[number]
    rewards, advantages = rollout.rewards[group].tolist(), rollout.advantages[group].tolist()
    columns = zip(rollout.texts[group], rewards, advantages, strict=True)
    rows = [
        {
            "completion": text,
            "rewards": {k: v for k, v in zip(config.all_rewards, rewards, strict=True) if not math.isnan(v)},
            "advantage": advantage,
        }
        for text, rewards, advantage in columns
    ]
    return sample_record(prompt) | {"group": rows}


def main(config: Config) -> None:
    began, dtype = time.monotonic(), compute_dtype(config.dtype)
    with process_group(bf16=dtype == torch.bfloat16, shard_within_node=config.shard_within_node) as world:
        samples, eval_sets = load_run_samples(config, world)
        policy, processor = load_policy(config, world)
        steps = total_steps(config, len(samples))
        second = config.beta > 0 and not config.lora_rank  # a reference that is a model of its own
        world = replace(world, draw_sharded=draws_sharded(config, policy, world, reference=second))
        if config.dry_run:
            text = describe_run(
                policy,
                processor,
                samples,
                config,
                world,
                steps,
                completions=config.group_size,
                reference=second,
            )
            if world.first:
                print(text)
            return
        reference = load_reference(config, world) if second else policy if config.beta else None
        optimizers, blank = make_optimizers(policy, config), blank_prompt(processor)
        if tower_is_frozen(policy):
            with drawing(policy, world):
                blank = replace(blank, inputs=see_images(policy, blank))
        ids = {"eos_ids": eos_token_ids(policy, processor), "banned_ids": banned_token_ids(policy, processor)}
        out = open_run(config, world)
        keeper = CheckpointKeeper(out, policy, optimizers, config, world, num_samples=len(samples))
        start = keeper.resume() if config.resume else 0
        budget = row_budget(config, policy, world, reference=second, known=keeper.row_tokens)
        log, stop = RunLog(out, config, world, start), StopSignal(config.max_hours, began)
        feed = PromptFeed(samples, processor, config, world, out / "bad_samples.jsonl", steps, start)
        bad, recent = BadSteps(out, config, world, start), deque(read_rows(out / "metrics.jsonl"), WARN_EVERY)
        if start == 0 and config.eval_every:
            keeper.best = evaluate_sets(policy, processor, eval_sets, 0, config, world, log)

        bar = tqdm(range(start, steps), initial=start, total=steps, disable=not world.first)
        for step in bar:
            rate = set_learning_rate(
                optimizers, learning_rate_factor(step, steps, config.warmup_steps, config.schedule)
            )
            figures, rollout = train_step(
                step, policy, reference, processor, optimizers, feed, blank, budget, config, world, ids
            )
            done = step + 1
            log.metrics(done, {**figures, "learning_rate": rate, **feed.figures()})
            recent.append(figures)
            bar.set_postfix(
                {name: f"{figures[name]:.3f}" for name in ("reward", "reward_std", "unparsed", "grad_norm")}
            )
            if done % config.log_completions_every == 0:
                log.write("completions.jsonl", done, group_record(rollout, 0, config))
            suspects = [group_record(rollout, number, config) for number in rollout.suspects]
            bad.after_step(done, figures, suspects, keeper.newest())
            if done % WARN_EVERY == 0 and world.first:
                for warning in causes_for_concern(recent, config):
                    tqdm.write(f"warning: step {done}: {warning}")
            score, last = None, done == steps or stop.agreed(world)
            if config.eval_every and (done % config.eval_every == 0 or done == steps):
                score = evaluate_sets(policy, processor, eval_sets, done, config, world, log)
            keeper.after_step(done, score, last=last, row_tokens=budget.tokens)
            if last and done < steps:
                log.say(f"stopped after step {done}; go on with: python train.py --resume {out}")
                break
        log.say(f"{out}: best score {keeper.best}, checkpoints in {out / 'checkpoints'}")


if __name__ == "__main__":
    launch(main, parse_options(Config, sys.argv[1:], toy.PRESETS["train"]))
