"""Means over seeds with their 95% intervals, paired comparisons, Markdown tables, and what they say in a sentence."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

Figures = Mapping[str, Mapping[str, Sequence[float]]]  # arm -> column -> a value per seed

# The 0.975 quantile of Student's t by its degrees of freedom, one less than the seeds.
T_QUANTILES = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060, 9: 2.2622}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the half width of its 95% interval by Student's t, infinite for one value."""
    if len(values) == 1:
        return values[0], math.inf
    return mean(values), T_QUANTILES[len(values) - 1] * stdev(values) / math.sqrt(len(values))


def difference(figures: Figures, column: str, first: str, second: str) -> tuple[str, float, float]:
    """How the first arm compares with the second: "higher", "lower" or "not different", the mean and the half width.

    The differences are paired by seed: both arms drew the same prompts in the same order. Without a name, the second
    is zero.
    """
    values = figures[first][column]
    others = figures[second][column] if second else [0.0 for _ in values]
    middle, half = interval([a - b for a, b in zip(values, others, strict=True)])
    if abs(middle) <= half or middle == 0:
        return "not different", middle, half
    return "higher" if middle > 0 else "lower", middle, half


def written(value: float, half: float | None = None) -> str:
    """A figure as the tables write it, with its half width where there is one."""
    digits = 3 if abs(value) < 10 else 1
    tail = "" if half is None or math.isinf(half) else f" ± {half:.{digits}f}"
    return f"{value:.{digits}f}{tail}"


def markdown_table(figures: Figures, columns: Sequence[str]) -> str:
    """A row for each arm; "-" where an arm has no such figure, no interval where all its values are one run's."""
    lines = ["| arm | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for arm, values in figures.items():
        cells = []
        for column in columns:
            middle, half = interval(values[column]) if column in values else (None, None)
            cells.append("-" if middle is None else written(middle, half or None))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare_all(figures: Figures, column: str, base: str) -> str:
    """One sentence on each arm beside the base, in the order of the arms."""
    parts = []
    for arm in figures:
        if arm != base and column in figures[arm] and column in figures[base]:
            verdict, middle, half = difference(figures, column, arm, base)
            parts.append(f"{arm} is {_than(verdict)} {base} ({_change(middle, half)})")
    return f"{column}: " + "; ".join(parts) + "."


def _change(middle: float, half: float) -> str:
    return f"{middle:+.3f}" if math.isinf(half) else f"{middle:+.3f} ± {half:.3f}"


def _than(verdict: str) -> str:
    return "not different from" if verdict == "not different" else f"{verdict} than"


def judge(figures: Figures, claims: Sequence[tuple[str, str, str, str]]) -> str:
    """Whether the claims (arm, "higher" or "lower", other arm, column) show: all, some or none by their intervals."""
    lines, held = [], 0
    for first, expected, second, column in claims:
        if column not in figures[first] or (second and column not in figures[second]):
            lines.append(f"- no: {first} or {second} has no {column} in some seed")
            continue
        verdict, middle, half = difference(figures, column, first, second)
        held += verdict == expected
        mark = "yes" if verdict == expected else "no"
        lines.append(f"- {mark}: {column} of {first} is {_than(verdict)} {second or 0} ({_change(middle, half)})")
    if held == len(claims):
        word = "shown"
    else:
        word = "partly shown" if held else "not shown"
    return f"**{word}**: {held} of {len(claims)} claims hold by the 95% interval over seeds.\n\n" + "\n".join(lines)
