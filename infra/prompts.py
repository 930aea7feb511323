"""From data files to the prompts of a step: samples read and checked, held out, prepared one step ahead."""

import copy
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm
from transformers import ProcessorMixin

from data import BadSample, Sample, check_samples, mixed_indices, read_samples, step_indices
from infra.options import RunConfig, file_names
from infra.parallel import World, all_sum
from infra.runlog import append_rows, read_rows
from model.vlm import Prompt, build_prompt

MAX_BAD_SHARE = 0.01  # of the samples used; more than that is a broken data set, not a broken file


def load_samples(
    files: Sequence[str],
    roots: Sequence[str],
    *,
    has_boxes: Sequence[bool],  # of each file, as read_samples takes it
    progress: bool,
    allow_outside_root: bool = False,
    numbers: Sequence[int] | None = None,  # of the data files that these are, or are evaluated like
) -> list[list[Sample]]:
    """The checked samples of each file."""
    numbers = range(len(files)) if numbers is None else numbers
    sets = [
        read_samples(path, root, has_boxes=boxes, allow_outside_root=allow_outside_root, file=number)
        for path, root, boxes, number in zip(files, _roots_of(files, roots), has_boxes, numbers, strict=True)
    ]
    check_samples([sample for samples in sets for sample in samples], progress=progress)
    return sets


def _roots_of(files: Sequence[str], roots: Sequence[str]) -> list[str | Path]:
    return [roots[number % len(roots)] if roots else Path(path).parent for number, path in enumerate(files)]


def seeded_sample(samples: list[Sample], limit: int, seed: int) -> list[Sample]:
    """The first `limit` (0: all) after a seeded shuffle, as VLM-R1 draws its 2,000 with seed 42."""
    if not 0 < limit < len(samples):
        return samples
    shuffled = list(samples)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:limit]


def split_held_out(samples: list[Sample], held_out: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(for training, held out): a seeded draw of at most a twentieth; the same on every rank and on resume."""
    count = min(held_out, len(samples) // 20)
    chosen = set(random.Random(seed).sample(range(len(samples)), count))
    return [s for i, s in enumerate(samples) if i not in chosen], [s for i, s in enumerate(samples) if i in chosen]


class PromptFeed:
    """The prompts of each step, this rank's share, prepared in a thread one step ahead.

    Samples that turn out broken are set aside, named and replaced by the next.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: ProcessorMixin,
        config: RunConfig,
        world: World,
        log: Path,
        steps: int,  # of the run; nothing is prepared beyond
        start: int = 0,  # steps done before this process
    ):
        self.samples, self.config, self.world, self.log, self.steps = samples, config, world, log, steps
        self.sizes = list(Counter(sample.file for sample in samples).values())  # they follow each other file by file
        self.processor = copy.deepcopy(processor)  # a tokenizer in use by two threads at once may raise
        self.broken: dict[int, str] = {}  # sample -> reason
        self.step = start
        self.used = start * len(range(world.rank, config.prompts_per_step, world.size))
        self._restore()
        self.num_broken = len(self.broken)  # of the steps taken, without what the thread has found ahead of them
        self.thread = ThreadPoolExecutor(1)
        self.ahead: tuple[int, Future] | None = None

    def _restore(self) -> None:
        """What was set aside before a resume; the ranks of then may be more or fewer than those of now."""
        places = {(sample.source, sample.id): index for index, sample in enumerate(self.samples)}
        for row in read_rows(self.log):
            index = places.get((row["source"], row["id"]))
            if index is not None and row["rank"] % self.world.size == self.world.rank:
                self.broken[index] = row["reason"]

    def figures(self) -> dict[str, float]:
        """How many samples were set aside on all ranks so far."""
        return all_sum({"bad_samples": float(self.num_broken)}, self.world)

    def take(self, step: int) -> list[Prompt]:
        """The prompts of a step, every world.size-th from this rank on; those of the next are begun."""
        if self.ahead is None or self.ahead[0] != step:
            self.ahead = step, self.thread.submit(self._prepare, step)
        prompts, self.num_broken = self.ahead[1].result()
        self.ahead = (step + 1, self.thread.submit(self._prepare, step + 1)) if step + 1 < self.steps else None
        return prompts

    def _prepare(self, step: int) -> tuple[list[Prompt], int]:
        self.step = step
        place = self.config.prompts_per_step, step, self.config.seed
        if self.config.file_shares:
            indices = mixed_indices(self.sizes, self.config.file_shares, *place)
        else:
            indices = step_indices(len(self.samples), *place)
        return [self._build(index) for index in indices[self.world.rank :: self.world.size]], len(self.broken)

    def _build(self, index: int) -> Prompt:
        """The prompt of that sample, or of the next one that is not broken."""
        self.used += 1
        while True:
            if index not in self.broken:
                try:
                    sample = self.samples[index]
                    template = self.config.tasks[sample.file].template
                    return build_prompt(self.processor, sample, template=template, box_space=self.config.box_space)
                except BadSample as error:
                    self._set_aside(index, error)
            index = (index + 1) % len(self.samples)

    def _set_aside(self, index: int, error: BadSample) -> None:
        self.broken[index] = str(error)
        sample = self.samples[index]
        tqdm.write(f"warning: {sample.source} is set aside: {error}")
        place = {"step": self.step + 1, "rank": self.world.rank}
        append_rows(self.log, [place | {"source": sample.source, "id": sample.id, "reason": str(error)}])
        if len(self.broken) > max(2, MAX_BAD_SHARE * self.used):
            raise ValueError(
                f"{len(self.broken)} of {self.used} samples used are broken, more than {MAX_BAD_SHARE:.0%}: mend the "
                f"data; they are named in {self.log}, the last one: {error}"
            )


def sample_record(prompt: Prompt) -> dict:
    """What names a prompt in a file of the run: its sample, and the truth as the model is to answer it."""
    sample = prompt.sample
    return {"id": sample.id, "images": sample.images, "question": sample.question, "answer": prompt.answer}


def load_run_samples(config: RunConfig, world: World) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """(training samples, evaluation sets by name); the sets are --eval_data's files or what is held out of each."""
    options = {"progress": world.first, "allow_outside_root": config.allow_outside_root}
    boxes = [task.has_boxes for task in config.tasks]
    sets = load_samples(config.data, config.image_root, has_boxes=boxes, **options)
    if config.eval_data:
        like = config.eval_files
        options |= {"has_boxes": [boxes[number] for number in like], "numbers": like}
        eval_sets = load_samples(config.eval_data, config.eval_image_root, **options)
        eval_sets = [seeded_sample(part, config.eval_limit, config.seed) for part in eval_sets]
        return [sample for part in sets for sample in part], dict(
            zip(file_names(config.eval_data), eval_sets, strict=True)
        )
    splits = [split_held_out(part, config.held_out, config.seed) for part in sets]
    names = ["held_out"] if len(sets) == 1 else [task.name for task in config.tasks]
    held_out = {name: part for name, (_, part) in zip(names, splits, strict=True) if part}
    return [sample for part, _ in splits for sample in part], held_out
