"""Evaluation: greedy answers on held-out samples, scored by the parser and the overlap that the reward uses.

Training evaluates the model in training with these functions, and eval.py any other model, so that both print the same
numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import ProcessorMixin

from data import BadSample, Sample, answer_boxes, template_text
from infra.parallel import World, all_gather, drawing
from infra.plugins import RewardCall, run_rewards
from infra.terminal import say
from model.vlm import Prompt, banned_token_ids, build_prompt, eos_token_ids, to_image_box
from rewards import first_box, iou, parse_boxes
from rollout import sample_completions


@dataclass(frozen=True)
class Protocol:
    """What the samples of a file are evaluated under."""

    template: str
    measure: str  # "detection", or the name of a reward
    max_completion_tokens: int
    batch_size: int
    box_space: str = ""
    reward_seconds: float = 0.0
    seed: int = 0


def answer_samples(
    model: nn.Module,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    world: World,
    protocol: Protocol,
    tell: Callable[[int, int], None] | None = None,  # is told how many are answered, of how many
) -> list[dict]:
    """A row per sample with its greedy answer and its score, in their order; every rank answers its share."""
    eos, banned = eos_token_ids(model, processor), banned_token_ids(model, processor)
    mine = list(enumerate(samples))[world.rank :: world.size]
    rows = []
    with drawing(model, world) as forward:
        for start in range(0, len(mine), protocol.batch_size):
            if tell and world.first:
                tell(start * world.size, len(samples))
            prompts = {}
            for number, sample in mine[start : start + protocol.batch_size]:
                try:
                    prompts[number] = build_prompt(
                        processor, sample, template=protocol.template, box_space=protocol.box_space
                    )
                except BadSample as error:
                    rows.append({"index": number, "id": sample.id, "bad_sample": str(error)})
            if not prompts:
                continue
            answers = sample_completions(
                model,
                list(prompts.values()),
                1,
                max_new_tokens=protocol.max_completion_tokens,
                eos_ids=eos,
                temperature=0,
                banned_ids=banned,
                forward=forward,
            )
            for (number, prompt), [ids] in zip(prompts.items(), answers, strict=True):
                text = prompt.answer_text(processor.tokenizer.decode(ids, skip_special_tokens=True))
                ended = int(ids[-1]) in eos
                row = {"index": number, **_row(prompt, protocol), "completion": text, "truncated": not ended}
                rows.append(row | {"family": model.config.model_type})
    scored = score_answers(rows, reward_seconds=protocol.reward_seconds, seed=protocol.seed)
    return sorted(all_gather(scored, world), key=lambda row: row["index"])


def _row(prompt: Prompt, protocol: Protocol) -> dict:
    """What a row says about its sample: enough to score the answer again without the data file."""
    sample = prompt.sample
    return {
        "id": sample.id,
        "question": sample.question,
        "images": sample.images,
        "answer": sample.answer,
        "truth": prompt.answer,
        "has_boxes": sample.has_boxes,
        "method": sample.reward,
        "template": protocol.template,
        "measure": protocol.measure,
        "box_space": protocol.box_space,
        "image_size": prompt.image_size,
        "input_size": prompt.input_size,
        "extra": sample.extra,
    }


SCORES = ("box", "iou", "predicted", "true", "unread", "reward", "reward_error")  # the keys of a score


def score_answers(rows: Sequence[dict], *, reward_seconds: float = 0.0, seed: int = 0) -> list[dict]:
    """The rows, each with the score of its answer under the measure that it names; a score it had is dropped."""
    rows = [{key: value for key, value in row.items() if key not in SCORES} for row in rows]
    calls = {}  # of the rows that a reward scores, run together: plugins run side by side
    for number, row in enumerate(rows):
        if "bad_sample" in row:
            continue
        if score := score_boxes(row):
            row.update(score)
        else:
            fields = row.get("extra", {}) | {name: row[name] for name in ("id", "question", "images")}
            spec = row["method"] or row["measure"]
            calls[number] = RewardCall(spec, row["completion"], row["truth"], fields, seed * 1_000_003 + row["index"])
    results = run_rewards(list(calls.values()), seconds=reward_seconds, stop_at_first=False)
    for (number, call), (value, reason) in zip(calls.items(), results, strict=True):
        rows[number]["reward"] = value
        if reason:
            rows[number]["reward_error"] = f"reward {call.spec} {reason}"
    return rows


def score_boxes(row: dict) -> dict | None:
    """The score of an answer in boxes, which are in pixels of the original image; None for another kind of answer.

    The overlap is taken in the model's space: the two axes are scaled there, but the overlap is the same.
    """
    text = row["completion"]
    if row["measure"] == "detection":
        predicted, true = parse_boxes(text), parse_boxes(row["truth"])
        return {
            "predicted": [(_in_image(box, row), label) for box, label in predicted or []],
            "true": [(_in_image(box, row), label) for box, label in true or []],
            "unread": predicted is None,
        }
    boxes = answer_boxes(row["truth"]) if row["has_boxes"] else None
    if (row["method"] or row["measure"]) not in ("iou", "giou") or not boxes or len(boxes) > 1:
        return None
    # A base model is not asked for tags, so its box may stand anywhere; if the prompt asks for tags, it may not.
    untagged = "<answer>" not in template_text(row["template"]) + text
    box = first_box(text, anywhere=untagged)
    return {"box": _in_image(box, row), "iou": iou(box, boxes[0]) if box else 0.0}


def _in_image(box: list[float] | None, row: dict) -> list[float] | None:
    if box is None:
        return None
    return to_image_box(box, row["image_size"], row["input_size"], row["family"], row["box_space"])


def handle_reward_errors(rows: Sequence[dict], on_reward_error: str, world: World) -> None:
    """Stops, on every rank since all have all rows, or warns if a reward gave no number and counts 0."""
    wrong = [row for row in rows if "reward_error" in row]
    if not wrong:
        return
    first = f"sample {wrong[0]['id']}: {wrong[0]['reward_error']}, for {wrong[0]['completion'][:200]!r}"
    if on_reward_error == "stop":
        raise ValueError(f"{first}; {len(wrong)} of {len(rows)} answers have no reward: mend the reward")
    if world.first:
        say(f"warning: {len(wrong)} of {len(rows)} answers score 0, the first: {first}")
