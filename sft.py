"""Supervised fine-tuning: the baseline that the paper compares GRPO with, on the same data, prompts and evaluator.

The loss is on the answer's tokens alone, averaged over all of them in the step; several samples share a packed row.
A true box is written as {"bbox_2d": [x1, y1, x2, y2]}, rounded to whole numbers in the space the model answers in.
"""

import sys

import toy
from infra.config import SftConfig
from infra.options import config_from_command_line

if __name__ == "__main__":  # before torch is imported, so that --help and a mistyped option answer at once
    CONFIG = config_from_command_line(SftConfig, sys.argv[1:], toy.PRESETS["sft"])

import json
import re

import torch
from torch import Tensor
from transformers import ProcessorMixin

from data import IMAGE_MARK, answer_boxes, move_answer_boxes
from infra.dryrun import print_plan
from infra.parallel import all_sum, gradient_scale, launch
from infra.run import Run, start_run
from model.vlm import Prompt
from rollout import completion_logprobs


def main(config: SftConfig) -> int:
    """Trains to the last step, or until the run is told to stop; returns the exit code."""
    if config.dry_run:
        return print_plan(config, completions=1)
    with start_run(config) as run:
        for _ in run.steps():
            prompts = run.prompts()
            run.end_step(train_step(run, prompts), prompts)
        return run.exit_code


def train_step(run: Run, prompts: list[Prompt]) -> dict[str, float]:
    """One optimizer step on the answers of these prompts; its figures, summed over ranks."""
    with run.timed("learn"):
        answers = [response_ids(run.processor, prompt, run.config.response) for prompt in prompts]
        num_tokens = all_sum({"tokens": float(sum(map(len, answers)))}, run.world)["tokens"]
        run.policy.train()
        total = 0.0
        for row in run.pack(prompts, [[ids] for ids in answers], range(len(prompts))):
            logprobs = completion_logprobs(run.policy, row.prompts, row.completions, banned_ids=run.banned_ids)
            loss = -sum(values.sum() for values in logprobs) / num_tokens
            (loss * gradient_scale(run.world)).backward()
            total += float(loss.detach())
        grad_norm = run.update(total)
    return {**all_sum({"loss": total}, run.world), "answer_tokens": num_tokens, "grad_norm": grad_norm}


def response_ids(processor: ProcessorMixin, prompt: Prompt, response: str) -> Tensor:
    """The tokens to imitate [C], end token included."""
    answer = prompt.answer
    if prompt.sample.has_boxes:
        answer = move_answer_boxes(answer, lambda box: [round(side) for side in box])
        if answer_boxes(answer, bare=True) and answer.startswith("[") and not answer.startswith("[{"):
            answer = json.dumps({"bbox_2d": json.loads(answer)})
    question = prompt.sample.question.replace(IMAGE_MARK, "").strip()
    texts = {f"{{{key}}}": value for key, value in prompt.sample.extra.items() if isinstance(value, str)}
    texts |= {"{answer}": answer, "{question}": question}
    if missing := {*re.findall(r"\{\w+\}", response)} - {*texts}:
        raise ValueError(
            f"{prompt.sample.source}: the record has no text field for {', '.join(sorted(missing))} of --response "
            f"{response!r}: mend one of them"
        )
    text = re.sub("|".join(map(re.escape, texts)), lambda match: texts[match[0]], response)
    text = text.removeprefix(prompt.opening.rstrip())  # the chat template has written it
    ids = processor.tokenizer([text], add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    return torch.cat([ids, ids.new_tensor([processor.tokenizer.eos_token_id])])


if __name__ == "__main__":
    toy.ensure_data(path for file in CONFIG.files for path in (file.file, *file.eval_files))
    launch(main, CONFIG)
