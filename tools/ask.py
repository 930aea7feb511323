"""Asks a model about images, and draws the boxes that it answers.

    python -m tools.ask MODEL IMAGE "the red car"     prints the answer and its box, and writes ask.png
    python -m tools.ask MODEL QUESTIONS.jsonl         writes ask.html, a gallery

MODEL is a hub name, a directory, an adapter or a checkpoint of a run, which is asked under the template and pixels of
that run. A line of QUESTIONS.jsonl is {"image": "car.jpg", "question": "the red car"}; a relative path starts from the
directory of the file. Boxes are in pixels of the original image.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import ProcessorMixin

from data import BadSample, Sample, load_image
from infra.config import EvalConfig
from infra.parallel import compute_dtype
from infra.pictures import draw_marks
from infra.protocol import Target, settle
from infra.report import Thumbnails
from infra.report_data import is_listed, read_marks
from infra.report_page import Mark, escaped, page
from infra.terminal import hide_library_bars, in_terminal
from model.vlm import Prompt, banned_token_ids, build_prompt, eos_token_ids, load_any
from rollout import sample_completions

COLOURS = ("#e6194b", "#2f7fff", "#2ca02c", "#f58231", "#a030c0", "#009999", "#b08000", "#e377c2")
BATCH = 16  # questions answered together


@dataclass(frozen=True)
class AskOptions:
    """What the command line says."""

    model: str
    image: str
    question: str
    samples: int
    temperature: float
    template: str
    max_completion_tokens: int | None
    output: str


@dataclass(frozen=True)
class Answers:
    """What a model says about one image."""

    prompt: Prompt
    texts: list[str]
    marks: list[list[Mark]]  # of each text, in pixels of the original image

    @property
    def path(self) -> str:
        """The image."""
        return self.prompt.sample.images[0]


def ask(
    questions: Sequence[tuple[str, str]],  # (image, question)
    config: EvalConfig,
    target: Target,
    *,
    samples: int,
    temperature: float,
) -> Iterator[Answers]:
    """The answers to each question: one greedy answer, or several drawn ones."""
    model, processor = load_any(
        config.model,
        max_pixels=config.max_pixels,
        min_pixels=config.min_pixels,
        dtype=compute_dtype(config.dtype),
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    generator = torch.Generator(device).manual_seed(config.seed)
    asked = [Sample("ask", question, "", (image,), "", has_boxes=False, source=image) for image, question in questions]
    for start in range(0, len(asked), BATCH):
        prompts = [
            build_prompt(processor, sample, template=target.template, box_space=config.box_space)
            for sample in asked[start : start + BATCH]
        ]
        completions = sample_completions(
            model,
            prompts,
            samples,
            max_new_tokens=config.max_completion_tokens,
            eos_ids=eos_token_ids(model, processor),
            temperature=temperature if samples > 1 else 0.0,
            banned_ids=banned_token_ids(model, processor),
            generator=generator,
        )
        for prompt, group in zip(prompts, completions, strict=True):
            yield read_answers(model, processor, prompt, group, config.box_space)


def read_answers(
    model: nn.Module, processor: ProcessorMixin, prompt: Prompt, group: Sequence[torch.Tensor], box_space: str
) -> Answers:
    """The texts of a prompt's completions, and the boxes in them."""
    texts = [prompt.answer_text(text) for text in processor.tokenizer.batch_decode(group, skip_special_tokens=True)]
    place = {
        "image_size": prompt.image_size,
        "input_size": prompt.input_size,
        "family": model.config.model_type,
        "box_space": box_space,
    }
    return Answers(prompt, texts, [read_marks(text, place, listed=is_listed(text)) for text in texts])


# ---- what comes out ------------------------------------------------------------------------------------------------


def describe(marks: Sequence[Mark]) -> str:
    """The boxes of an answer as text."""
    told = [
        f"[{', '.join(f'{side:.1f}' for side in mark.box)}]" + (f" {mark.label}" if mark.label else "")
        for mark in marks
    ]
    return ", ".join(told) or "no box"


def draw(answers: Answers) -> Image.Image:
    """The image with the boxes of all answers, each answer in its colour."""
    marks = []
    for number, found in enumerate(answers.marks):
        name = str(number + 1) if len(answers.texts) > 1 else ""
        marks += [(COLOURS[number % len(COLOURS)], Mark(mark.box, mark.label or name)) for mark in found]
    return draw_marks(load_image(answers.path), marks)


def gallery(answers: Sequence[Answers], title: str) -> str:
    """A page with a card for each question."""
    images = Thumbnails([{"images": [item.path]} for item in answers])
    cards = []
    for item in answers:
        sample = item.prompt.sample
        drawn = [(n, COLOURS[n % len(COLOURS)], mark) for n, marks in enumerate(item.marks) for mark in marks]
        row = {"images": sample.images, "image_size": item.prompt.image_size}
        told = "".join(
            f'<p><code class="text">{escaped(text)}</code><br><small>{escaped(describe(marks))}</small></p>'
            for text, marks in zip(item.texts, item.marks, strict=True)
        )
        cards.append(
            f'<article class="answer">{images.picture(row, [], drawn)}<p class="question text">'
            f"{escaped(sample.question)}</p>{told}<small>{escaped(Path(item.path).name)}</small></article>"
        )
    return page(title, [f"<h1>{escaped(title)}</h1>", f'<div class="gallery">{"".join(cards)}</div>'])


def read_questions(path: Path) -> list[tuple[str, str]]:
    """(image, question) of each line."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, question = row["image"], row["question"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number}: {error!r}; write a line such as {{"image": "car.jpg", "question": "the red car"}}'
            ) from None
        found.append((str(path.parent / image), question))
    if not found:
        raise ValueError(f"{path}: holds no question")
    return found


def run(options: AskOptions) -> None:
    """Answers what the command line asks, prints it and writes the picture or the gallery."""
    source = Path(options.image)
    is_list = source.suffix == ".jsonl"
    if not source.is_file():
        raise ValueError(f"{source}: no such file; give an image, or a .jsonl file of images and questions")
    if is_list == bool(options.question):
        raise ValueError("give an image with one question in quotes, or a .jsonl file without one")
    questions = read_questions(source) if is_list else [(str(source), options.question)]
    config, [target] = settle(
        EvalConfig(
            model=options.model,
            data=[str(source)],
            template=options.template,
            max_completion_tokens=options.max_completion_tokens,
        )
    )
    if not in_terminal():
        hide_library_bars()
    out = Path(options.output or ("ask.html" if is_list else "ask.png"))
    found = []
    for answers in ask(questions, config, target, samples=options.samples, temperature=options.temperature):
        found.append(answers)
        for text, marks in zip(answers.texts, answers.marks, strict=True):
            print(
                (f"{answers.path}, {answers.prompt.sample.question!r}: " if is_list else "")
                + f"{text}\n  {describe(marks)}"
            )
    if is_list:
        out.write_text(gallery(found, f"{options.model}: {source.name}"), encoding="utf-8")
    else:
        draw(found[0]).save(out)
    print(out)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m tools.ask", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("model", help="hub name, directory, adapter or checkpoint of a run")
    made.add_argument("image", help="an image, or a .jsonl file of images and questions")
    made.add_argument("question", nargs="?", default="", help="the question about the image")
    made.add_argument("--samples", type=int, default=1, help="answers to draw; 1, the default, is the greedy answer")
    made.add_argument("--temperature", type=float, default=1.0, help="of several samples; 1 by default, as in training")
    made.add_argument("--template", default="", help="as in eval.py; by default the run's, else rec")
    made.add_argument("--max_completion_tokens", type=int, default=None, help="by default the run's, else 256")
    made.add_argument("--output", default="", help="file to write; ask.png or ask.html by default")
    return made


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    options = AskOptions(**vars(parser().parse_args(argv)))
    try:
        if options.samples < 1 or options.temperature <= 0:
            raise ValueError(f"samples {options.samples} and temperature {options.temperature} must be above 0")
        run(options)
    except (ValueError, OSError, BadSample) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
