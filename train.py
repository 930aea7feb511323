"""GRPO on a Hugging Face vision-language model; `train_step` is one step of the paper's algorithm.

`python train.py` trains the toy on this machine. With --model, --data and --image_root it trains a real model, one
process per GPU, under VLM-R1's recipe. Not supported: several optimizer steps per pass, replay, reward models.

Shapes: B prompts of this rank, G completions of each, N = B * G, C tokens of the longest completion; n of the N
completions share a packed row.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import toy
from infra.config import TrainConfig
from infra.options import config_from_command_line

if __name__ == "__main__":  # before torch is imported, so that --help and a mistyped option answer at once
    CONFIG = config_from_command_line(TrainConfig, sys.argv[1:], toy.PRESETS["train"])

import re

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from grpo import gdpo_advantages, gdpo_sums, group_advantages, grpo_loss
from infra.dryrun import print_plan
from infra.figures import causes_for_concern, group_figures, reward_key, speed_figures, step_figures
from infra.parallel import all_gather, all_max, all_sum, drawing, gradient_scale, launch
from infra.plugins import NOT_RUN, RewardCall, run_rewards
from infra.rows import Row, empty_truncated, on_host
from infra.run import Run, start_run
from infra.terminal import say
from model.lora import adapters_off
from model.vlm import Prompt
from rollout import completion_logprobs, sample_completions, see_images, stack_groups, tower_is_frozen

LOSS_FIGURES = ("loss", "kl", "clamped", "clip_low", "clip_high")
DRIFT_FIGURES = ("draw_gap", "draw_gap_max", "entropy", "tokens")


def main(config: TrainConfig) -> int:
    """Trains to the last step, or until the run is told to stop; returns the exit code."""
    if config.dry_run:
        return print_plan(config, completions=config.group_size)
    with start_run(config) as run:
        first = run.step
        for step in run.steps():
            rollout, figures = train_step(run)
            if step == first:
                run.log.show(step, "the first prompt as the model reads it, and a completion", example(run, rollout))
            logged = (step + 1) % config.log_completions_every == 0
            run.end_step(figures, rollout.prompts, group_record(run, rollout) if logged else None)
            run.warn_once(causes_for_concern(run.recent, config))
        return run.exit_code


def train_step(run: Run) -> tuple["Rollout", dict[str, float]]:
    """One step of GRPO; returns what was drawn, and the figures of the step over all ranks."""
    config = run.config

    # 1. Draw G completions of each prompt and pay them by rule. An advantage compares a completion with its group.
    with run.timed("draw"):
        rollout = draw_and_pay(run)
        advantages = step_advantages(run, rollout)
        rollout = replace(rollout, advantages=advantages)

    # 2. Pack the groups that teach into rows, each prompt once, and score them under the reference.
    with run.timed("score"):
        learned = empty_truncated(rollout.completions, run.eos_ids) if config.mask_truncated else rollout.completions
        rows = run.pack(rollout.prompts, learned, groups_that_teach(advantages, config))
        ref_logprobs = reference_logprobs(run, rows)

    # 3. Learn. The losses of rows and ranks add up to the loss of the step, however it was cut.
    with run.timed("learn"):
        run.policy.train()
        options = loss_options(run, learned)
        first_pass: list[Score] = []
        sums = dict.fromkeys(LOSS_FIGURES, 0.0)
        for _ in range(config.num_iterations):
            scores = []
            pass_loss = 0.0
            for number, row in enumerate(rows):
                logprobs, entropies = score_row(run, run.policy, row)
                scores.append(Score(logprobs.detach(), entropies.detach()))
                # The first pass runs on the weights that drew: its log-probs are the old ones of every pass.
                old_logprobs = first_pass[number].logprobs if first_pass else logprobs.detach()
                loss, figures = grpo_loss(
                    logprobs, old_logprobs, ref_logprobs[number], advantages[row.members], row.mask, **options
                )
                (loss * gradient_scale(run.world)).backward()
                pass_loss = pass_loss + loss.detach()  # a tensor: a float would wait for the device
                for name, value in figures.items():
                    sums[name] = sums[name] + value
            sums["loss"] = sums["loss"] + pass_loss
            grad_norm = run.update(float(pass_loss))
            first_pass = first_pass or scores
    drawn = rollout_figures(run, rollout)
    return rollout, {
        **drawn,
        **speed_figures(run, drawn["completion_tokens"]),
        **learning_figures(run, sums, drift_sums(rollout, rows, first_pass)),
        "grad_norm": grad_norm,
    }


@dataclass(frozen=True)
class Rollout:
    """What a step draws, and what it earns."""

    prompts: list[Prompt]  # B
    completions: list[list[Tensor]]  # B lists of G id tensors
    draw_logprobs: Tensor  # [N, C] log-probs while drawing
    texts: list[str]  # N
    paid: list[dict[str, float]]  # N: the value of each reward by name
    totals: Tensor  # [N] the weighted sum of the rewards
    num_reward_errors: int  # rewards that gave no number and count 0
    advantages: Tensor | None = None  # [N]
    num_thrown: int = 0  # groups that were drawn and thrown away, with --refill


@dataclass(frozen=True)
class Score:
    """A row's completions under a model."""

    logprobs: Tensor  # [n, C]
    entropies: Tensor  # [n, C] of the next token


# ---- draw and pay --------------------------------------------------------------------------------------------------


def draw_and_pay(run: Run) -> Rollout:
    """What the step draws and earns; with --refill, groups that teach nothing are thrown away and drawn anew.

    A group gives way to one of another prompt of its file, so the shares of a mix stay. All ranks draw as many rounds.
    """
    config = run.config
    rollout = pay(run, *draw(run, run.prompts()))
    for number in range(config.refill_rounds if config.refill else 0):
        equal = equal_groups(run, rollout, accuracy=config.refill == "accuracy")
        if not all_sum({"equal": float(len(equal))}, run.world)["equal"]:
            break
        files = {place: rollout.prompts[place].sample.file for place in equal}
        others = run.feed.replacements(run.step, number, files)
        fresh = pay(run, *draw(run, others), first=(number + 1) * len(rollout.texts))
        rollout = put_groups(rollout, equal, fresh, config.group_size)
    return rollout


def equal_groups(run: Run, rollout: Rollout, *, accuracy: bool = False) -> list[int]:
    """The prompts whose completions all earn the same: in total, under gdpo in each reward, or in accuracy alone."""
    if accuracy:
        earned = each_reward(run, rollout)[0][:, :1]
    elif run.config.advantages == "gdpo":
        values, weights = each_reward(run, rollout)
        earned = values * weights
    else:
        earned = rollout.totals.cpu()[:, None]
    groups = earned.view(len(rollout.prompts), run.config.group_size, -1)
    return (groups == groups[:, :1]).all(2).all(1).nonzero()[:, 0].tolist()


def put_groups(rollout: Rollout, places: Sequence[int], fresh: Rollout, group_size: int) -> Rollout:
    """The rollout with the fresh groups in these places; what was there is thrown away."""
    order = list(range(len(rollout.prompts)))
    for number, place in enumerate(places):
        order[place] = len(rollout.prompts) + number
    members = [group * group_size + index for group in order for index in range(group_size)]
    prompts, completions = rollout.prompts + fresh.prompts, rollout.completions + fresh.completions
    texts, paid = rollout.texts + fresh.texts, rollout.paid + fresh.paid
    return Rollout(
        prompts=[prompts[group] for group in order],
        completions=[completions[group] for group in order],
        draw_logprobs=stack_groups([rollout.draw_logprobs, fresh.draw_logprobs])[members],
        texts=[texts[member] for member in members],
        paid=[paid[member] for member in members],
        totals=torch.cat([rollout.totals, fresh.totals])[members],
        num_reward_errors=rollout.num_reward_errors + fresh.num_reward_errors,
        num_thrown=rollout.num_thrown + len(places),
    )


def draw(run: Run, prompts: list[Prompt]) -> tuple[list[Prompt], list[list[Tensor]], Tensor]:
    """The prompts, G completions of each, and the completions' log-probs [N, C] while drawing."""
    config, completions, logprobs = run.config, [], []
    batch = max(1, config.draw_batch_size // config.group_size)
    with drawing(run.policy, run.world) as forward:
        if tower_is_frozen(run.policy):
            prompts = [replace(prompt, inputs=see_images(run.policy, prompt)) for prompt in prompts]
        for start in range(0, len(prompts), batch):
            drawn, drawn_logprobs = sample_completions(
                run.policy,
                prompts[start : start + batch],
                config.group_size,
                max_new_tokens=config.max_completion_tokens,
                eos_ids=run.eos_ids,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                banned_ids=run.banned_ids,
                generator=run.generator,
                return_logprobs=True,
                forward=forward,
            )
            completions += drawn
            logprobs += drawn_logprobs
    if not prompts:  # this rank has nothing to refill
        return prompts, completions, torch.zeros(0, 0, device=run.world.device)
    padded = pad_sequence([values for group in logprobs for values in group], batch_first=True)
    return prompts, completions, padded


def pay(
    run: Run,
    prompts: list[Prompt],
    completions: list[list[Tensor]],
    draw_logprobs: Tensor,
    first: int = 0,  # number of the first completion in the step, for the seeds of your own rewards
) -> Rollout:
    """The rollout: its texts, the rewards that each completion earns by rule, and their weighted sums."""
    config, flat = run.config, [ids for group in completions for ids in group]
    texts = run.processor.tokenizer.batch_decode(flat, skip_special_tokens=True) if flat else []  # else [""]
    owners = [prompt for prompt in prompts for _ in range(config.group_size)]  # N: the prompt of each completion
    texts = [owner.answer_text(text) for owner, text in zip(owners, texts, strict=True)]
    calls = [
        reward_call(run, owner, number, spec, text)
        for number, (owner, text) in enumerate(zip(owners, texts, strict=True), first)
        for spec in rewards_of(owner, config)
    ]
    stop = config.on_reward_error == "stop"
    results = iter(run_rewards(calls, seconds=config.reward_seconds, stop_at_first=stop))
    paid, totals, errors = [], [], []
    for owner, text in zip(owners, texts, strict=True):
        specs = rewards_of(owner, config)
        earned = [next(results) for _ in specs]  # (value, what went wrong)
        values = [value for value, _ in earned]
        paid.append(dict(zip(specs, values, strict=True)))
        totals.append(float((torch.tensor(values) * torch.tensor(config.files[owner.sample.file].weights)).sum()))
        errors += [
            f"sample {owner.sample.id}: reward {spec} {reason}, for {text[:200]!r}"
            for spec, (_, reason) in zip(specs, earned, strict=True)
            if reason and reason != NOT_RUN
        ]
    handle_reward_errors(run, errors)
    return Rollout(
        prompts=prompts,
        completions=completions,
        draw_logprobs=draw_logprobs,
        texts=texts,
        paid=paid,
        totals=torch.tensor(totals, device=run.world.device),
        num_reward_errors=len(errors),
    )


def rewards_of(prompt: Prompt, config: TrainConfig) -> list[str]:
    """The rewards that a prompt is paid by: its file's, the first replaced by the sample's own method if it has one."""
    first, *others = config.files[prompt.sample.file].rewards
    return [prompt.sample.reward or first, *others]


def each_reward(run: Run, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Each reward of each completion by itself and its weight, [N, K] both, zeros where a prompt has fewer rewards."""
    config, values, weights = run.config, [], []
    owners = [prompt for prompt in rollout.prompts for _ in range(config.group_size)]
    for owner, paid in zip(owners, rollout.paid, strict=True):
        values.append(torch.tensor([paid[spec] for spec in rewards_of(owner, config)]))
        weights.append(torch.tensor(config.files[owner.sample.file].weights))
    return pad_sequence(values, batch_first=True), pad_sequence(weights, batch_first=True)


def reward_call(run: Run, prompt: Prompt, number: int, spec: str, text: str) -> RewardCall:
    """One reward of one completion, the `number`-th of this rank's step."""
    sample = prompt.sample
    fields = {**sample.extra, "id": sample.id, "question": sample.question, "images": sample.images}
    # Another seed for each run, step, rank and completion; the factors are primes above what each number reaches.
    seed = ((run.config.seed * 1_000_003 + run.step) * 65_537 + run.world.rank) * 1_000_003 + number
    return RewardCall(spec, text, prompt.answer, fields, seed)


def handle_reward_errors(run: Run, errors: list[str]) -> None:
    """Stops all ranks together with the sample named, or warns, if a reward of any rank gave no number."""
    count = all_sum({"errors": float(len(errors))}, run.world)["errors"]
    if not count:
        return
    first = all_gather(errors[:1], run.world)[0]
    if run.config.on_reward_error == "stop":
        raise ValueError(f"{first}; mend the reward, or let such completions score 0 with --on_reward_error zero")
    if run.world.first:
        say(f"warning: {count:.0f} rewards count 0, the first: {first}")


# ---- score and learn -----------------------------------------------------------------------------------------------


def step_advantages(run: Run, rollout: Rollout) -> Tensor:
    """How much better each completion is than the others of its group, [N]."""
    config = run.config
    if config.advantages == "group":
        return group_advantages(rollout.totals, config.group_size, scale=config.divides_by_deviation)
    sums = gdpo_sums(*each_reward(run, rollout), config.group_size)
    squares = all_sum({"squares": float(sums.square().sum())}, run.world)["squares"]
    num_completions = config.completions_per_step
    return gdpo_advantages(sums, sum_of_squares=squares, num_completions=num_completions).to(run.world.device)


def groups_that_teach(advantages: Tensor, config: TrainConfig) -> list[int]:
    """The prompts whose completions are worth a forward: equal rewards teach nothing unless the KL penalty does."""
    differ = (advantages.view(-1, config.group_size) != 0).any(1).tolist()
    return [number for number, teaches in enumerate(differ) if teaches or config.beta > 0]


def score_row(run: Run, model: nn.Module, row: Row) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [n, C] of a row's completions under the distribution that was drawn from."""
    logprobs, entropies = completion_logprobs(
        model,
        row.prompts,
        row.completions,
        temperature=run.config.temperature,
        banned_ids=run.banned_ids,
        return_entropies=True,
    )
    return stack_groups(logprobs), stack_groups(entropies)


@torch.no_grad()
def reference_logprobs(run: Run, rows: Sequence[Row]) -> list[Tensor | None]:
    """Log-probs [n, C] of each row's completions under the reference; None for each row where beta is 0."""
    if run.config.beta == 0:
        return [None for _ in rows]
    if run.following is not None:
        with run.following.in_place(run.step):
            return [score_row(run, run.policy, row)[0] for row in rows]
    if run.reference is not None:
        return [score_row(run, run.reference, row)[0] for row in rows]
    with adapters_off(run.policy):  # with LoRA the policy without its adapters is the reference
        return [score_row(run, run.policy, row)[0] for row in rows]


def loss_options(run: Run, learned: list[list[Tensor]]) -> dict:
    """The keywords of grpo_loss, with the denominators of the whole step over all ranks."""
    config = run.config
    num_tokens = sum(len(ids) for group in learned for ids in group)
    return {
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        "beta": config.beta,
        "variant": config.variant,
        "max_completion_tokens": config.max_completion_tokens,
        "num_completions": config.completions_per_step,  # masked ones too, as in TRL
        "num_tokens": max(1.0, all_sum({"tokens": float(num_tokens)}, run.world)["tokens"]),
    }


# ---- figures and records -------------------------------------------------------------------------------------------


def rollout_figures(run: Run, rollout: Rollout) -> dict[str, float]:
    """What the drawn completions tell, averaged over the step."""
    groups, size = [], run.config.group_size
    completions, totals = on_host(rollout.completions), rollout.totals.cpu()
    equal = equal_groups(run, rollout) if run.config.advantages == "gdpo" else None
    for number, prompt in enumerate(rollout.prompts):
        place = slice(number * size, (number + 1) * size)
        group = group_figures(prompt, rollout.texts[place], completions[number], totals[place], run)
        if equal is not None:
            group["groups_equal"] = float(number in equal)
        for spec in rollout.paid[place.start]:
            values = [paid[spec] for paid in rollout.paid[place]]
            group[reward_key(spec)] = sum(values) / size
        groups.append(group)
    files = [prompt.sample.file for prompt in rollout.prompts]
    counts = {"reward_errors": float(rollout.num_reward_errors)}
    if run.config.refill:
        counts["groups_thrown"] = float(rollout.num_thrown)
        counts["groups_drawn"] = float(rollout.num_thrown + len(rollout.prompts))
    return step_figures(groups, files, run.config, run.world) | all_sum(counts, run.world)


def drift_sums(rollout: Rollout, rows: Sequence[Row], scores: Sequence[Score]) -> dict[str, Tensor]:
    """How far the log-probs of the first pass are from those while drawing, and the entropies: sums over the tokens."""
    sums = {name: torch.zeros((), device=rollout.totals.device) for name in DRIFT_FIGURES}
    for row, score in zip(rows, scores, strict=True):
        drawn = rollout.draw_logprobs[row.members, : row.mask.shape[1]]
        gap = (drawn - score.logprobs).abs() * row.mask
        sums["draw_gap"] = sums["draw_gap"] + gap.sum()
        sums["entropy"] = sums["entropy"] + (score.entropies * row.mask).sum()
        largest = sums["draw_gap_max"].view(1)  # a blank row has no gap at all
        sums["draw_gap_max"] = torch.cat([gap.flatten(), largest]).amax()
        sums["tokens"] = sums["tokens"] + row.mask.sum()
    return sums


def learning_figures(run: Run, sums: dict[str, Tensor], drift: dict[str, Tensor]) -> dict[str, float]:
    """The loss and its figures as means over passes, and the drift per token; no drift if no token was learned."""
    device = run.world.device
    values = [torch.as_tensor(value, device=device).double() for value in (sums | drift).values()]
    told = dict(zip(sums | drift, torch.stack(values).tolist(), strict=True))  # one wait for the device
    largest = all_max({"draw_gap_max": told.pop("draw_gap_max")}, run.world)
    for name in sums:
        told[name] /= run.config.num_iterations
    told = all_sum(told, run.world)
    figures = {name: told[name] for name in sums}
    if count := told["tokens"]:
        figures |= {"draw_gap": told["draw_gap"] / count, **largest, "entropy": told["entropy"] / count}
    return figures


def example(run: Run, rollout: Rollout) -> str:
    """The first prompt with its special tokens, its first completion, and what that earned: most faults show here."""
    tokenizer = run.processor.tokenizer
    text = tokenizer.decode(rollout.prompts[0]["input_ids"][0]) + tokenizer.decode(rollout.completions[0][0])
    # An image is one token, repeated.
    text = re.sub(r"(<[^<>]+>)\1{3,}", lambda match: f"{match[1]} x {len(match[0]) // len(match[1])} ", text)
    rewards = "  ".join(f"{reward_key(spec)} {value:.3g}" for spec, value in rollout.paid[0].items())
    return f"{text}\n{rewards}  advantage {rollout.advantages[0]:.3g}"


def group_record(run: Run, rollout: Rollout) -> dict:
    """The step's first group with all that it earned, for completions.jsonl."""
    prompt, advantages, totals = rollout.prompts[0], rollout.advantages.tolist(), rollout.totals.tolist()
    rows = [
        {
            "completion": rollout.texts[n],
            "rewards": rollout.paid[n],
            "reward": totals[n],
            "advantage": advantages[n],
        }
        for n in range(run.config.group_size)
    ]
    sample = prompt.sample
    return {
        "id": sample.id,
        "file": run.config.files[sample.file].name,
        "images": sample.images,
        "question": sample.question,
        "answer": prompt.answer,
        # what moves a box of an answer back into the image, see model/families.py
        "image_size": prompt.image_size,
        "input_size": prompt.input_size,
        "family": run.policy.config.model_type,
        "box_space": run.config.box_space,
        "group": rows,
    }


if __name__ == "__main__":
    toy.ensure_data(path for file in CONFIG.files for path in (file.file, *file.eval_files))
    launch(main, CONFIG)
