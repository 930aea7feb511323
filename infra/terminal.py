"""What a run shows while it runs; every figure stands in metrics.jsonl and eval.jsonl.

A terminal gets one bar with the time left and six figures, and above it a line per evaluation and the warnings. A log
file gets a line every --log_every steps, and no character that redraws a line.
"""

import shutil
import statistics
import sys
import textwrap
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm
from transformers.utils import logging

from infra.config import RunConfig
from infra.report_data import EVALUATED, best_row
from infra.report_page import figure_name
from metrics.summary import headline

# The figures of a step and how its line writes them; the first also leads a line of a log file.
GRPO_SHOWN = {"reward": "reward {:#.3g}", "completion_tokens": "len {:.0f}", "groups_equal": "equal {:.0%}"}
SFT_SHOWN = {"loss": "loss {:#.3g}", "answer_tokens": "tokens {:.0f}", "grad_norm": "gradient {:#.2g}"}
PHASES = {"seconds_draw": "draw", "seconds_score": "score", "seconds_learn": "learn"}
GRPO_LEGEND = "reward, last accuracy, tokens, equal groups, seconds draw+score+learn"
SFT_LEGEND = "loss, last accuracy, tokens of the answers, gradient norm, seconds"
NAME_WIDTH = 13  # of the first column of the table
TEXT_WIDTH = 60  # of the bar's line; a text that is padded to it leaves the bar where it was
RECENT = 25  # steps whose median says how long the next ones take

# ---- lines ---------------------------------------------------------------------------------------------------------


def in_terminal() -> bool:
    """Whether lines and bars meet in one terminal: through `| tee` they do not."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def hide_library_bars() -> None:
    """Turns off the bars of transformers and of the hub: they tear ours apart, and a log file keeps each redraw."""
    logging.disable_progress_bar()


def say(text: str, *, whole: bool = False) -> None:
    """Prints a text above the bar; a terminal gets its lines broken between words, unless they are to stay whole."""
    if sys.stdout.isatty() and not whole:
        width = shutil.get_terminal_size().columns - 1
        wrapper = textwrap.TextWrapper(
            width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False, replace_whitespace=False
        )
        text = "\n".join(wrapper.fill(line) for line in text.split("\n"))
    tqdm.write(text)
    sys.stdout.flush()  # a log file shows how far the run is


def clock(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds: 12h02 or 2:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def short_path(path: str | Path) -> str:
    """The path from here, if it lies below."""
    here, path = Path.cwd(), Path(path)
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def header(config: RunConfig, out: Path, samples: int, sizes: Sequence[int], num_steps: int) -> list[str]:
    """What is trained on what, and where the run writes; `sizes` are those of what is trained and of the model."""
    trained, parameters = sizes
    share = "all" if trained == parameters else f"{trained:,}"
    lora = f" (LoRA of rank {config.lora_rank})" if config.lora_rank else ""
    prompts, group = config.prompts_per_step, getattr(config, "group_size", 0)
    step = f"{prompts} prompts x {group} completions" if group else f"{prompts} samples"
    rewards = [spec.rsplit(":", 1)[-1] for spec in getattr(config, "reward_names", [])]
    paid = f", paid by {' + '.join(rewards)}" if rewards else ""
    legend = GRPO_LEGEND if group else SFT_LEGEND
    return [
        f"model   {short_path(config.model)}: {share} of {parameters:,} parameters trained{lora}",
        f"data    {', '.join(file.name for file in config.files)}: {samples:,} samples",
        f"steps   {num_steps:,} of {step}{paid}",
        f"output  {out}",
        *([f"bar     {legend}"] if in_terminal() else []),
    ]


def step_figures(figures: dict[str, float], score: str) -> list[str]:
    """The figures of a step for the bar, with the score of the last evaluation; those that the step lacks are left out.

    The last one is the seconds of each phase.
    """
    shown = GRPO_SHOWN if "reward" in figures else SFT_SHOWN
    told = [text.format(figures[key]) for key, text in shown.items() if figures.get(key) is not None]
    if score:
        told.insert(1, score)
    seconds = [figures[key] for key in PHASES if key in figures]
    return [*told, "+".join(f"{value:.1f}" if value < 9.95 else f"{value:.0f}" for value in seconds) + "s"]


def summary_line(name: str, summary: dict) -> str:
    """The first figures of an evaluation with their intervals."""
    told = [f"{figure_name(figure)} {_with_interval(summary, figure)}" for figure in _first_figures(summary)]
    return f"{name}: {', '.join(told)}"


def _first_figures(summary: dict) -> list[str]:
    return [figure for figure in EVALUATED if figure in summary][:3]


def evaluation_line(step: int, name: str, summary: dict, start: dict) -> str:
    """The first figures of an evaluation, each with its change since the start."""
    told = []
    for figure in _first_figures(summary):
        change = summary[figure] - start[figure] if start.get(figure) is not None else None
        rise = "" if change is None or start["step"] == step else f" ({change:+.3f})"
        told.append(f"{figure_name(figure)} {summary[figure]:.3f}{rise}")
    return f"step {step:,}, {name}: {', '.join(told)}"


def _short_score(summary: dict) -> str:
    figure = "accuracy" if "accuracy" in summary else headline(summary)
    name = {"accuracy": "acc", "reward": "eval"}.get(figure, figure_name(figure))  # a step has a reward too
    return "" if summary[figure] is None else f"{name} {summary[figure]:.2f}"


def score_table(evaluations: dict[str, list[dict]]) -> list[str]:
    """Each evaluation set at the start, at its best and at the end, with the 95% intervals."""
    lines = []
    for name, rows in evaluations.items():
        chosen = rows[0], best_row(rows)[1], rows[-1]
        heads = [f"{title}, step {row['step']:,}" for title, row in zip(("first", "best", "last"), chosen, strict=True)]
        lines += [_columns(name, heads)] if len(name) < NAME_WIDTH else [name, _columns("", heads)]
        for figure in EVALUATED:
            if figure in rows[-1]:
                lines.append(_columns(f"  {figure_name(figure)}", [_with_interval(row, figure) for row in chosen]))
    return lines


def _with_interval(row: dict, figure: str) -> str:
    value, low, high = (row.get(key) for key in (figure, f"{figure}_low", f"{figure}_high"))
    interval = f" ({low:.2f} to {high:.2f})" if low is not None else ""
    return f"{value:.3f}{interval}" if value is not None else "-"


def _columns(name: str, cells: Sequence[str]) -> str:
    return name.ljust(NAME_WIDTH) + "".join(f"{cell:<22}" for cell in cells).rstrip()


# ---- while a run goes on -------------------------------------------------------------------------------------------


class Terminal:
    """The bar of a run, or its lines in a log file, and the time that its phases take. Only rank 0 shows anything."""

    def __init__(self, config: RunConfig, *, first: bool):
        self.config, self.first = config, first
        self.bar: tqdm | None = None
        self.line = "first step"
        self.starts: dict[str, dict] = {}  # the first evaluation of each set
        self.score = ""  # the last evaluation of the first set
        self.spent: Counter[str] = Counter()  # seconds of each phase
        self.recent: deque[float] = deque(maxlen=RECENT)  # seconds of the last steps
        self.began = self.mark = time.perf_counter()
        self.aside = 0.0  # seconds of evaluations and saves since the last step
        self.last_evaluation = 0.0  # its seconds
        self.step = self.total = 0
        self.num_steps = 0  # that this process has done

    def restore(self, evaluations: dict[str, list[dict]]) -> None:
        """Takes over the evaluations of a run that is resumed."""
        self.starts = {name: rows[0] for name, rows in evaluations.items()}
        for rows in list(evaluations.values())[:1]:
            self.score = _short_score(rows[-1])

    def begin(self, step: int, total: int) -> None:
        """Starts the clock, and shows the bar."""
        self.step, self.total = step, total
        self.began = self.mark = time.perf_counter()
        if self.first and in_terminal():
            form = "{n_fmt}/{total_fmt} {bar} {desc}"
            self.bar = tqdm(total=total, initial=step, bar_format=form, dynamic_ncols=True, leave=False)
            self._draw(self.line)

    def end_step(self, step: int, figures: dict[str, float]) -> None:
        """Shows the step that is done."""
        now = time.perf_counter()
        self.recent.append(now - self.mark - self.aside)
        self.mark, self.aside = now, 0.0
        self.step, self.num_steps = step, self.num_steps + 1
        for key, phase in PHASES.items():
            if key in figures:
                self.spent[phase] += figures[key]
        told, left = step_figures(figures, self.score), f"{clock(self.seconds_left())} left"
        self.line = f"{left}  {' '.join(told)}"
        if self.bar is not None:
            self.bar.n = step
            self._draw(self.line)
        elif self.first and (self.num_steps == 1 or step % self.config.log_every == 0 or step == self.total):
            length = [f"length {figures['completion_tokens']:.1f}"] if "completion_tokens" in figures else []
            say("  ".join([f"step {step}/{self.total}", told[0], *length, f"{self.recent[-1]:.2f} s", left]))

    def _draw(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_description_str(text.ljust(TEXT_WIDTH))

    def seconds_left(self) -> float:
        """How long the run will take, from the median step, the time of the saves so far and the last evaluation."""
        every, steps, evaluations = self.config.eval_every, self.total - self.step, 0
        if every:  # also one after this step, if it is due, and one at the end
            evaluations = self.total // every - (self.step - 1) // every + (self.total % every > 0)
        saving = self.spent["save"] / max(1, self.num_steps)
        return steps * (statistics.median(self.recent) + saving) + evaluations * self.last_evaluation

    @contextmanager
    def aside_from_steps(self, phase: str) -> Iterator[None]:
        """Measures an evaluation or a save, which is no part of a step."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.spent[phase] += seconds
        self.aside += seconds
        if phase == "evaluate":
            self.last_evaluation = seconds
            self._draw(self.line)

    def evaluating(self, name: str, done: int, count: int) -> None:
        """Shows how far an evaluation is."""
        self._draw(f"evaluating {name}: {done}/{count}")

    def evaluated(self, step: int, name: str, summary: dict[str, float]) -> None:
        """Prints what an evaluation found, and the change since the first one."""
        if not self.first:
            return
        say(evaluation_line(step, name, summary, self.starts.setdefault(name, {"step": step, **summary})))
        if name == next(iter(self.starts)):
            self.score = _short_score(summary)

    def close(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def time_line(terminal: Terminal) -> str:
    """The time since the run, or its continuation, has begun, and the share of each phase."""
    total = time.perf_counter() - terminal.began
    phases = [*terminal.spent.most_common(), ("rest", max(0.0, total - terminal.spent.total()))]
    told = [f"{name} {seconds / total:.0%}" for name, seconds in phases if seconds >= 0.005 * total]
    return ", ".join([clock(total), *told])


@contextmanager
def evaluation_bar(name: str, count: int, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar for an evaluation outside of a run; yields the function that is told how many are answered, of how many."""
    disable = None if shown else True  # None draws in a terminal alone
    with tqdm(desc=name, total=count, disable=disable, leave=False, dynamic_ncols=True) as bar:
        yield lambda done, _: bar.update(done - bar.n)
