"""From data files to the prompts of each step: samples read, checked and held out, prompts prepared one step ahead."""

import copy
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from transformers import ProcessorMixin

from data import BadSample, Sample, answer_boxes, mixed_indices, read_samples, step_indices
from infra.config import RunConfig
from infra.datacheck import check_data
from infra.mix import DataFile, file_names
from infra.parallel import World, all_sum
from infra.runlog import append_rows, read_rows
from infra.terminal import say
from model.vlm import Prompt, build_prompt
from rewards import check_truth

MAX_BAD_SHARE = 0.01  # of the samples used; more means a broken data set rather than a broken file


@dataclass(frozen=True)
class RunSamples:
    """What a run trains and evaluates on."""

    training: list[Sample]
    eval_sets: dict[str, list[Sample]]  # the evaluation files, or what is held out of each data file
    sizes: dict[str, tuple[int, int]]  # (width, height) of the images that were opened, by path


def load_run_samples(config: RunConfig, world: World) -> RunSamples:
    """Reads and checks the data files and evaluation files of a run."""
    files = config.files
    sets = [_read(config, file, file.file, file.image_root, number) for number, file in enumerate(files)]
    pairs = [(number, path) for number, file in enumerate(files) for path in file.eval_files]
    eval_sets = []
    for number, path in pairs:
        root = files[number].eval_image_root or str(Path(path).parent)
        eval_sets.append(_read(config, files[number], path, root, number))
    sizes, warnings = check_data([*sets, *eval_sets], progress=world.first)
    if world.first:
        for warning in warnings:
            say(f"warning: {warning}")
    if eval_sets:
        limited = [seeded_sample(part, config.eval_limit, config.seed) for part in eval_sets]
        named = dict(zip(file_names([path for _, path in pairs]), limited, strict=True))
        return RunSamples([sample for part in sets for sample in part], named, sizes)
    splits = [split_held_out(part, config.held_out, config.seed) for part in sets]
    names = ["held_out"] if len(sets) == 1 else [file.name for file in files]
    held_out = {name: part for name, (_, part) in zip(names, splits, strict=True) if part}
    return RunSamples([sample for part, _ in splits for sample in part], held_out, sizes)


def _read(config: RunConfig, file: DataFile, path: str, root: str, number: int) -> list[Sample]:
    samples = read_samples(
        path, root, has_boxes=file.has_boxes, allow_outside_root=config.allow_outside_root, file=number
    )
    check_truths(samples, file.rewards)
    return samples


def check_truths(samples: Sequence[Sample], rewards: Sequence[str]) -> None:
    """Refuses a sample whose truth its reward cannot score; a sample's own method replaces the first reward."""
    for sample in samples:
        for spec in (sample.reward or rewards[0], *rewards[1:]):
            if reason := check_truth(spec, sample.answer):
                raise ValueError(f"{sample.source}: {reason}")
            if spec == "cosine_length" and not sample.has_boxes and answer_boxes(sample.answer):
                raise ValueError(
                    f"{sample.source}: the truth {sample.answer} is a box, which cosine_length compares by IoU, and no "
                    "reward of this file moves it into the space the model answers in: name iou beside cosine_length"
                )


def seeded_sample(samples: list[Sample], limit: int, seed: int) -> list[Sample]:
    """The first `limit` samples (0: all) after a seeded shuffle, as VLM-R1 draws its 2,000 with seed 42."""
    if not 0 < limit < len(samples):
        return samples
    shuffled = list(samples)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:limit]


def split_held_out(samples: list[Sample], held_out: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(for training, held out): a seeded draw of at most a twentieth, the same on every rank and after a resume."""
    count = min(held_out, len(samples) // 20)
    chosen = set(random.Random(seed).sample(range(len(samples)), count))
    return [s for i, s in enumerate(samples) if i not in chosen], [s for i, s in enumerate(samples) if i in chosen]


class PromptFeed:
    """The prompts of each step, this rank's share, prepared by a thread one step ahead.

    A sample that turns out to be broken is set aside, named in bad_samples.jsonl and replaced by the next one.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: ProcessorMixin,
        config: RunConfig,
        world: World,
        log: Path,
        start: int = 0,  # steps done before this process
    ):
        self.samples, self.config, self.world, self.log = samples, config, world, log
        self.sizes = list(Counter(sample.file for sample in samples).values())  # files follow one another
        self.processor = copy.deepcopy(processor)  # a tokenizer that two threads use at once may raise
        self.broken: dict[int, str] = {}  # sample -> reason
        self.step = start
        self.used = start * len(range(world.rank, config.prompts_per_step, world.size))
        self._restore()
        self.num_broken = len(self.broken)  # up to the step taken, without what the thread found ahead of it
        self.num_late = 0  # found by replacements, after the next step was prepared
        self.thread = ThreadPoolExecutor(1)
        self.ahead: tuple[int, Future] | None = None

    def _restore(self) -> None:
        """Restores what was set aside before a resume; the number of ranks may have changed since."""
        places = {(sample.source, sample.id): index for index, sample in enumerate(self.samples)}
        for row in read_rows(self.log):
            index = places.get((row["source"], row["id"]))
            if index is not None and row["rank"] % self.world.size == self.world.rank:
                self.broken[index] = row["reason"]

    def figures(self) -> dict[str, float]:
        """How many samples all ranks have set aside so far."""
        return all_sum({"bad_samples": float(self.num_broken)}, self.world)

    def take(self, step: int, *, last: bool = False) -> list[Prompt]:
        """The prompts of a step, every world.size-th from this rank on; unless it is the last, the next are begun."""
        if self.ahead is None or self.ahead[0] != step:
            self.ahead = step, self.thread.submit(self._prepare, step)
        prompts, num_broken = self.ahead[1].result()
        self.num_broken, self.num_late = num_broken + self.num_late, 0
        self.ahead = None if last else (step + 1, self.thread.submit(self._prepare, step + 1))
        return prompts

    def _prepare(self, step: int) -> tuple[list[Prompt], int]:
        self.step = step
        place = self.config.prompts_per_step, step, self.config.seed
        if self.config.shares:
            indices = mixed_indices(self.sizes, self.config.shares, *place)
        else:
            indices = step_indices(len(self.samples), *place)
        return [self._build(index) for index in indices[self.world.rank :: self.world.size]], len(self.broken)

    def replacements(self, step: int, round: int, files: dict[int, int]) -> list[Prompt]:
        """Other prompts for these places among this rank's prompts of a step, each of the data file named.

        They are a function of seed, step, round and place, like everything drawn: a resume needs no state. Each file
        has a shuffled order of its own for them, in which every place of a round has a position.
        """
        prompts, num_found = self.thread.submit(self._prepare_replacements, step, round, files).result()
        self.num_broken += num_found
        self.num_late += num_found
        return prompts

    def _prepare_replacements(self, step: int, round: int, files: dict[int, int]) -> tuple[list[Prompt], int]:
        self.step, before, prompts = step, len(self.broken), []
        place = self.config.prompts_per_step, step * self.config.refill_rounds + round
        first_seed = self.config.seed * 1_000_003 + 1  # the steps themselves have other orders
        orders = {file: step_indices(self.sizes[file], *place, first_seed + file) for file in set(files.values())}
        for number, file in files.items():
            index = orders[file][number * self.world.size + self.world.rank]
            prompts.append(self._build(sum(self.sizes[:file]) + index))
        return prompts, len(self.broken) - before

    def _build(self, index: int) -> Prompt:
        """The prompt of that sample, or of the next one that is not broken."""
        self.used += 1
        while True:
            if index not in self.broken:
                try:
                    sample = self.samples[index]
                    template = self.config.files[sample.file].template
                    return build_prompt(self.processor, sample, template=template, box_space=self.config.box_space)
                except BadSample as error:
                    self._set_aside(index, error)
            index = (index + 1) % len(self.samples)

    def _set_aside(self, index: int, error: BadSample) -> None:
        self.broken[index] = str(error)
        sample = self.samples[index]
        say(f"warning: {sample.source} is skipped: {error}")
        place = {"step": self.step + 1, "rank": self.world.rank}
        append_rows(self.log, [place | {"source": sample.source, "id": sample.id, "reason": str(error)}])
        if len(self.broken) > max(2, MAX_BAD_SHARE * self.used):
            raise ValueError(
                f"{len(self.broken)} of the {self.used} samples used are broken, more than {MAX_BAD_SHARE:.0%}: mend "
                f"the data; {self.log} names them, the last one: {error}"
            )
