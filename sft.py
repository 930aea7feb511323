"""Supervised fine-tuning, the baseline the paper compares GRPO with, on the same data, prompts, sharding and evaluator.

The loss is on the answer's tokens alone, averaged over all of them in the step; several samples share a packed row.
A true box is written as {"bbox_2d": [x1, y1, x2, y2]}, rounded to whole numbers in the space the model answers in.
"""

import json
import math
import re
import sys
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ProcessorMixin
from transformers.hf_argparser import HfArg

import toy
from data import IMAGE_MARK, answer_boxes, move_answer_boxes
from eval import evaluate_sets
from infra.memory import RowBudget, draws_sharded, micro_batches, peak_memory_gb, row_budget
from infra.options import RunConfig, Task, compute_dtype, parse_options
from infra.parallel import World, all_sum, apply_gradients, clip_gradients, gradient_scale, launch, process_group
from infra.prompts import PromptFeed, load_run_samples, sample_record
from infra.run import (
    StopSignal,
    describe_run,
    learning_rate_factor,
    load_policy,
    make_optimizers,
    seed_step,
    set_learning_rate,
    timed,
    total_steps,
)
from infra.runlog import BadSteps, CheckpointKeeper, RunLog, open_run
from model.vlm import Prompt, banned_token_ids, blank_prompt, hide_special, spell_out, trainable
from rewards import load_reward
from rollout import completion_logprobs


@dataclass(frozen=True)
class Config(RunConfig):
    response: str = HfArg(
        default="<answer>{answer}</answer>", help="text to imitate, with {answer} and, if wanted, {question}"
    )
    reward: str = HfArg(default="iou", help="reward that evaluation reports, where the data names none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{answer}" not in self.response:
            raise ValueError(f"response {self.response!r} lacks {{answer}}: there would be nothing to learn")
        load_reward(self.reward)

    @property
    def tasks(self) -> list[Task]:
        """What is done with each data file; of its rewards, evaluation reports the first."""
        return self.tasks_under([self.reward], [])


def response_ids(processor: ProcessorMixin, prompt: Prompt, response: str) -> Tensor:
    """The tokens to imitate [C], end token included."""
    answer = prompt.answer
    if prompt.sample.has_boxes:
        answer = move_answer_boxes(answer, lambda box: [round(side) for side in box])
        if answer_boxes(answer, bare=True) and answer.startswith("[") and not answer.startswith("[{"):
            answer = json.dumps({"bbox_2d": json.loads(answer)})
    question = prompt.sample.question.replace(IMAGE_MARK, "").strip()
    data, text, hidden = {"{question}": question, "{answer}": answer}, "", []
    for part in re.split(r"(\{question\}|\{answer\})", response):
        part, found = hide_special(processor, data[part]) if part in data else (part, [])
        text, hidden = text + part, hidden + found
    inputs = processor.tokenizer([text], add_special_tokens=False, return_tensors="pt")
    ids = spell_out(processor, dict(inputs), hidden)["input_ids"][0]
    return torch.cat([ids, ids.new_tensor([processor.tokenizer.eos_token_id])])


def train_step(
    policy: nn.Module,
    processor: ProcessorMixin,
    optimizers: list,
    prompts: list[Prompt],
    blank: Prompt,
    budget: RowBudget,
    config: Config,
    world: World,
) -> dict[str, float]:
    """One optimizer step on these prompts' answers; its figures, summed over ranks."""
    answers = [response_ids(processor, prompt, config.response) for prompt in prompts]
    num_tokens = all_sum({"tokens": float(sum(map(len, answers)))}, world)["tokens"]
    banned = banned_token_ids(policy, processor)
    policy.train()

    def attempt(row_tokens: int) -> float:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)  # of an attempt that ran out of memory
        total = 0.0
        for row_prompts, completions, _ in micro_batches(prompts, [[ids] for ids in answers], row_tokens, world, blank):
            logprobs = completion_logprobs(policy, row_prompts, completions, banned_ids=banned)
            loss = -sum(values.sum() for values in logprobs) / num_tokens
            (loss * gradient_scale(world)).backward()
            total += float(loss.detach())
        return total

    total = budget.attempt(attempt)
    norm = clip_gradients([parameter for _, parameter in trainable(policy)], config.max_grad_norm)
    loss = all_sum({"loss": total}, world)
    skipped = float(not apply_gradients(optimizers, norm if math.isfinite(loss["loss"]) else math.nan))
    return {
        **loss,
        "answer_tokens": num_tokens,
        "grad_norm": norm,
        "skipped_updates": skipped,
    }


def main(config: Config) -> None:
    began, dtype = time.monotonic(), compute_dtype(config.dtype)
    with process_group(bf16=dtype == torch.bfloat16, shard_within_node=config.shard_within_node) as world:
        samples, eval_sets = load_run_samples(config, world)
        policy, processor = load_policy(config, world)
        steps = total_steps(config, len(samples))
        world = replace(world, draw_sharded=draws_sharded(config, policy, world, reference=False))
        if config.dry_run:
            text = describe_run(policy, processor, samples, config, world, steps, completions=1, reference=False)
            if world.first:
                print(text)
            return
        optimizers, blank = make_optimizers(policy, config), blank_prompt(processor)
        out = open_run(config, world)
        keeper = CheckpointKeeper(out, policy, optimizers, config, world, num_samples=len(samples))
        start = keeper.resume() if config.resume else 0
        budget = row_budget(config, policy, world, reference=False, known=keeper.row_tokens)
        log, stop = RunLog(out, config, world, start), StopSignal(config.max_hours, began)
        feed = PromptFeed(samples, processor, config, world, out / "bad_samples.jsonl", steps, start)
        bad = BadSteps(out, config, world, start)
        if start == 0 and config.eval_every:
            keeper.best = evaluate_sets(policy, processor, eval_sets, 0, config, world, log)

        bar = tqdm(range(start, steps), initial=start, total=steps, disable=not world.first)
        for step in bar:
            rate = set_learning_rate(
                optimizers, learning_rate_factor(step, steps, config.warmup_steps, config.schedule)
            )
            seed_step(config, step, world)
            with timed("learn", world) as seconds:
                prompts = feed.take(step)
                figures = train_step(policy, processor, optimizers, prompts, blank, budget, config, world)
            done = step + 1
            figures |= {
                **seconds,
                "learning_rate": rate,
                "row_tokens": budget.tokens,
                "memory_gb": peak_memory_gb(world.device),
                **feed.figures(),
            }
            log.metrics(done, figures)
            bad.after_step(done, figures, [sample_record(prompt) for prompt in prompts], keeper.newest())
            bar.set_postfix(loss=f"{figures['loss']:.3f}", grad_norm=f"{figures['grad_norm']:.3f}")
            score, last = None, done == steps or stop.agreed(world)
            if config.eval_every and (done % config.eval_every == 0 or done == steps):
                score = evaluate_sets(policy, processor, eval_sets, done, config, world, log)
            keeper.after_step(done, score, last=last, row_tokens=budget.tokens)
            if last and done < steps:
                log.say(f"stopped after step {done}; go on with: python sft.py --resume {out}")
                break
        log.say(f"{out}: best score {keeper.best}, checkpoints in {out / 'checkpoints'}")


if __name__ == "__main__":
    launch(main, parse_options(Config, sys.argv[1:], toy.PRESETS["sft"]))
