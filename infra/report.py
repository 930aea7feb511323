"""Reads the files of a run and writes report.html, a page to look at.

The page shows what was run, its curves, groups of completions with their boxes on the image, and the answers of the
last evaluation. infra/report_page.py draws; this file decides what is shown. Training writes the page at each
evaluation, and `python -m tools.report OUT [OUT_B]` at any time, also for a run that was killed.

A long run is sampled: at most MAX_GROUPS groups, some answers of each kind, and images up to MAX_IMAGE_BYTES.
"""

import base64
import functools
import io
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np

from data import IMAGE_MARK, BadSample, load_image
from infra.config import SftConfig, TrainConfig
from infra.options import default_of
from infra.report_data import (
    EVALUATED,
    KINDS,
    RunFiles,
    best_row,
    is_listed,
    read_marks,
    read_run,
    rewards_of,
    scored_marks,
)
from infra.report_page import (
    Line,
    Mark,
    Picture,
    advantage_colour,
    chart,
    escaped,
    field,
    figure_name,
    legend,
    number,
    page,
    select,
    show_picture,
    table,
)

SIDE = 400  # pixels of a thumbnail's longer side
MAX_IMAGE_BYTES = 10_000_000  # of all thumbnails, as text

# (title, what it means, keys of metrics.jsonl); a curve that the run lacks is left out
CURVES = (
    ("Reward", "weighted sum, mean of the step", ("reward",)),
    ("Spread of rewards", "standard deviation inside a group", ("reward_std",)),
    ("Equal groups", "share of prompts that teach nothing", ("groups_equal",)),
    ("Length", "mean tokens of a completion", ("completion_tokens",)),
    ("Unreadable or cut off", "share of completions", ("unparsed", "truncated")),
    ("Loss", "near 0 in GRPO, and that is right", ("loss",)),
    ("KL", "to the reference, per token", ("kl",)),
    ("Entropy", "of the next token, in nats", ("entropy",)),
    ("Clipped", "share of tokens", ("clip_low", "clip_high")),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Learning rate", "", ("learning_rate",)),
    ("Seconds of a step", "by phase", ("seconds_draw", "seconds_score", "seconds_learn")),
    ("Tokens per second", "completion tokens, by phase", ("tokens_per_second_draw", "tokens_per_second_learn")),
    ("Memory", "most used so far, GB", ("memory_gb",)),
)
OFF_AT_ZERO = ("kl", "clip_low", "clip_high")  # without a penalty or a second pass


def write_report(outs: Sequence[str | Path]) -> Path:
    """Writes report.html into the first of these runs and returns its path; the curves of all share their axes."""
    runs = [read_run(Path(out)) for out in outs]
    first, *others = runs
    title = " and ".join(run.out.name for run in runs)
    images = Thumbnails([row for run in runs for row in (*run.groups, *run.answers)])
    names = [f" of {escaped(run.out.name)}" if others else "" for run in runs]
    sections = [f"<h1>{escaped(title)}</h1>"]
    for run in runs:
        sections += [f"<h2>{escaped(run.out.name)}</h2>"] if others else []
        sections.append(run_section(run))
    sections.append(curve_section(runs))
    sections += [group_section(run.groups, images, name) for run, name in zip(runs, names, strict=True)]
    sections += [answer_section(run.answers, images, name) for run, name in zip(runs, names, strict=True)]
    path, fresh = first.out / "report.html", first.out / ".report.html.partial"
    fresh.write_text(page(title, sections), encoding="utf-8")
    return fresh.rename(path)


# ---- images --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)  # each evaluation of a run shows the same images
def thumbnail(path: str) -> tuple[str, tuple[int, int]] | None:
    """(data URI, size of the original image), or None if the image cannot be read any more."""
    try:
        image = load_image(path)
    except BadSample:
        return None
    size, file = image.size, io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    small = max(size) <= 160
    image.save(file, "PNG" if small else "JPEG", quality=75)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", size


class Thumbnails:
    """The images that a page may show; what goes beyond MAX_IMAGE_BYTES is left blank."""

    def __init__(self, rows: Iterable[dict]):
        wanted = [row["images"][0] for row in rows if row.get("images") and row.get("shown", True)]
        paths = list(dict.fromkeys(wanted))
        with ThreadPoolExecutor(8) as pool:
            made = dict(zip(paths, pool.map(thumbnail, paths), strict=True))
        self.found, room = {}, MAX_IMAGE_BYTES
        for path in wanted:  # a page that shows an image twice holds it twice
            room -= len(made[path][0]) if made[path] else 0
            if made[path] and room >= 0:
                self.found[path] = made[path]

    def picture(self, row: dict, true: Sequence[Mark], predicted: Sequence[tuple[int, str, Mark]]) -> str:
        """The row's image with these marks as HTML; "" for a row without one."""
        path = (row.get("images") or [""])[0]
        uri, size = self.found.get(path, ("", row.get("image_size")))
        if not size:
            return '<p class="soft">The image cannot be read.</p>' if path else ""
        return show_picture(Picture(uri, tuple(size), true, predicted))


# ---- sections ------------------------------------------------------------------------------------------------------


def run_section(run: RunFiles) -> str:
    """What was run, how far it is, its best score, and the line that resumes it."""
    options = run.about.get("options", {})
    done = run.metrics[-1]["step"] if run.metrics else 0
    total = run.about.get("num_steps") or options.get("steps") or 0
    finished = bool(total) and done >= total
    target = f"{total:,}" if total else f"{options.get('epochs', '?')} epochs"
    state = f"step {done:,} of {target}, {'finished' if finished else 'not finished'}"
    if run.metrics and not finished:
        logged = time.localtime((run.out / "metrics.jsonl").stat().st_mtime)
        state += f", the last step was logged on {time.strftime('%Y-%m-%d at %H:%M', logged)}"
    files = run.about.get("files") or [{"name": Path(options.get("data") or "?").name}]
    data = ", ".join(str(file.get("name")) for file in files)
    tiles = [tile("steps", f"{done:,}", "finished" if finished else "so far"), *score_tiles(run)]
    if seconds := [sum(v or 0 for k, v in row.items() if k.startswith("seconds_")) for row in run.metrics]:
        tiles.append(tile("a step", f"{number(float(np.median(seconds)))} s", "median"))
    if skipped := sum(row.get("skipped_updates") or 0 for row in run.metrics):
        tiles.append(tile("skipped updates", number(skipped), "see bad_steps.jsonl"))
    script = "train.py" if "rewards" in options else "sft.py"
    resume = f"python {script} --resume {run.out}" + (" --steps N" if finished else "")
    versions = ", ".join(f"{name} {value}" for name, value in run.about.get("versions", {}).items())
    model, changed = "/".join(Path(str(options.get("model"))).parts[-2:]), changed_options(options)
    return (
        f'<section class="run"><p><b>{escaped(model)}</b> on <b>{escaped(data)}</b> '
        f'<span class="soft">{escaped(state)}; {escaped(versions)}</span></p><div class="tiles">{"".join(tiles)}</div>'
        f"{evaluation_table(run)}<p class='soft'>{'Train on' if finished else 'Continue'} with</p>"
        f"<pre>{escaped(resume)}</pre><details><summary>{len(changed)} options that differ from the defaults</summary>"
        f"{table(['option', 'value', 'default'], changed)}</details></section>"
    )


def changed_options(options: dict) -> list[tuple[str, str, str]]:
    """(name, value, default) of each option that differs from the default of its command."""
    config = TrainConfig if "rewards" in options else SftConfig
    defaults = {entry.name: default_of(entry) for entry in fields(config)}
    return [
        (name, json.dumps(value), json.dumps(defaults.get(name)))
        for name, value in options.items()
        if value != defaults.get(name) and name not in ("output_dir", "resume")
    ]


def with_interval(row: dict, name: str) -> str:
    """A figure with its interval, if it has one."""
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return number(row.get(name)) + (f" ({number(low)} to {number(high)})" if low is not None else "")


def tile(title: str, value: str, note: str) -> str:
    """One figure in large letters."""
    return f'<div class="tile"><small>{escaped(title)}</small><b>{value}</b><small>{escaped(note)}</small></div>'


def score_tiles(run: RunFiles) -> list[str]:
    """The best score of the first evaluation set, which decides what the best checkpoint is, and that of the start."""
    if not run.evaluations:
        return []
    name, rows = next(iter(run.evaluations.items()))
    figure, best = best_row(rows)
    low, high = best.get(f"{figure}_low"), best.get(f"{figure}_high")
    interval = "" if low is None else f"{number(low)} to {number(high)}, "
    return [
        tile(f"best {figure_name(figure)}, {name}", number(best.get(figure)), f"{interval}step {best['step']:,}"),
        tile("at the start", number(rows[0].get(figure)), f"step {rows[0]['step']:,}"),
    ]


def evaluation_table(run: RunFiles) -> str:
    """Each evaluation set at the start, at its best and now."""
    lines = []
    for name, rows in run.evaluations.items():
        _, best = best_row(rows)
        for figure in EVALUATED:
            if figure in rows[-1]:
                told = [with_interval(row, figure) for row in (rows[0], best, rows[-1])]
                lines.append((name, figure_name(figure), told[0], f"{told[1]}, step {best['step']:,}", told[2]))
    return table(["set", "figure", "start", "best", "last"], lines) if lines else ""


def curve_section(runs: Sequence[RunFiles]) -> str:
    """A chart for each figure that a run has; several runs share the axes."""
    charts = held_out_charts(runs)
    keys = dict.fromkeys(key for run in runs for row in run.metrics for key in row)
    files = [key for key in keys if key.startswith("file/") and key.endswith("/reward")]
    rewards = [key for key in keys if key.startswith("reward/")]
    curves = [CURVES[0], *((f"Reward {figure_name(key[7:])}", "mean of the step", (key,)) for key in rewards)]
    curves += [("Reward by file", "mean of the step", tuple(files))] if files else []
    for title, note, keys in (*curves, *CURVES[1:]):
        lines = [line for order, run in enumerate(runs) for line in metric_lines(run, keys, order, len(runs))]
        if lines:
            charts.append(chart(title, note, lines))
    if not charts:
        return "<h2>Curves</h2><p>No step has been logged yet.</p>"
    switch = '<label><input type="checkbox" id="smooth" checked> smooth (the raw curve stays faint behind it)</label>'
    return f'<h2>Curves</h2><div class="controls">{switch}</div><div class="charts">{"".join(charts)}</div>'


def metric_lines(run: RunFiles, keys: Sequence[str], order: int, runs: int) -> list[Line]:
    """The curves of a run under these keys; steps without a finite value are left out."""
    lines = []
    for key in keys:
        pairs = [(row["step"], row[key]) for row in run.metrics if row.get(key) is not None]
        if not pairs or (key in OFF_AT_ZERO and not any(value for _, value in pairs)):
            continue
        steps, values = np.array(pairs, dtype=float).T
        name = key.removeprefix("file/").removesuffix("/reward") if key.startswith("file/") else key
        name = name.removeprefix("tokens_per_second_").removeprefix("seconds_")
        name = figure_name(name.removeprefix("reward/"))
        if runs > 1:
            name = f"{run.out.name} {name}" if len(keys) > 1 else run.out.name
        lines.append(Line(name, steps, values, dashed=order > 0))
    return lines


def held_out_charts(runs: Sequence[RunFiles]) -> list[str]:
    """Charts of the evaluations, with their intervals and the value before training."""
    charts = []
    for name in dict.fromkeys(name for run in runs for name in run.evaluations):
        for figure in EVALUATED:
            lines = []
            for order, run in enumerate(runs):
                rows = [row for row in run.evaluations.get(name, []) if row.get(figure) is not None]
                if not rows:
                    continue
                low, high = f"{figure}_low", f"{figure}_high"
                bounds = np.array([[row[low], row[high]] for row in rows]) if low in rows[0] else None
                steps, values = (np.array([row[key] for row in rows], float) for key in ("step", figure))
                start = float(values[0]) if rows[0]["step"] == 0 else None
                told = run.out.name if len(runs) > 1 else figure_name(figure)
                lines.append(Line(told, steps, values, bounds, start, dashed=order > 0))
            if lines:
                note = "the band is the 95% interval" if lines[0].interval is not None else "greedy answers"
                charts.append(chart(f"{name}: {figure_name(figure)}", note, lines))
    return charts


def group_section(groups: Sequence[dict], images: Thumbnails, of_run: str = "") -> str:
    """The logged groups of completions, the most disputed first."""
    head = f"<h2>Groups{of_run}</h2>"
    if not groups:
        return f"{head}<p>No group has been logged: completions.jsonl is empty.</p>"
    spread = [float(np.std(rewards_of(group))) for group in groups]
    order = sorted(range(len(groups)), key=lambda place: -spread[place])
    files = dict.fromkeys(str(group["file"]) for group in groups if group.get("file"))
    orders = [("spread", "most disputed first"), ("best", "best first"), ("worst", "worst first")]
    controls = [
        field("order", select("order", [*orders, ("newest", "newest first"), ("oldest", "oldest first")])),
    ]
    for title, name in (("step", "step"), ("mean reward", "reward")):
        for word, end in ((f"{title} from", "from"), ("to", "to")):
            controls.append(field(word, f'<input type="number" step="any" name="{name}_{end}">'))
    if len(files) > 1:
        controls.append(field("file", select("file", [("", "all"), *((file, file) for file in files)])))
    return (
        f"{head}<p class='soft'>All completions of a prompt with what they earned. The advantage compares a completion "
        "with its group: blue ones become more likely, orange ones less. Point at a completion or at a box.</p>"
        f'{legend()}<form class="group-filters controls needs-js">{"".join(controls)}<output></output></form>'
        f'<div class="groups">{"".join(show_group(groups[place], spread[place], images) for place in order)}</div>'
    )


def plain(question: str) -> str:
    """A question without the marks of its images."""
    return question.replace(IMAGE_MARK, " ").strip()


def show_group(group: dict, spread: float, images: Thumbnails) -> str:
    """A group: the image with all boxes, the question, and the completions from the best to the worst."""
    rewards, rows, truth = rewards_of(group), group["group"], str(group["answer"])
    listed = is_listed(truth)
    true = read_marks(truth, group, listed=listed)
    drawn, items = [], []
    for place in sorted(range(len(rows)), key=lambda place: -(rows[place]["advantage"] or 0.0)):
        row, advantage = rows[place], rows[place]["advantage"] or 0.0
        colour, text = advantage_colour(advantage), str(row["completion"])
        if true or listed:
            drawn += [(place, colour, mark) for mark in read_marks(text, group, listed=listed)]
        parts = [f"{name.rsplit(':', 1)[-1]} {number(value)}" for name, value in row["rewards"].items()]
        parts = [f"reward {number(rewards[place])}", *parts] if len(parts) > 1 else parts
        items.append(
            f'<li data-k="{place}" tabindex="0"><span class="badge" style="background:{colour}">{advantage:+.2f}</span>'
            f'<span><small>{escaped(", ".join(parts))}</small><code class="text">{escaped(text)}</code></span></li>'
        )
    picture = images.picture(group, true, drawn)
    mean, file = float(np.mean(rewards)), str(group.get("file", ""))
    about = [f"step {group['step']:,}", file, str(group["id"]), f"mean reward {number(mean)}"]
    blind = "" if true or group.get("image_size") or not picture else "; this run did not log where boxes lie"
    return (
        f'<article class="group{"" if picture else " plain"}" data-step="{group["step"]}" data-reward="{mean:.6g}" '
        f'data-spread="{spread:.6g}" data-file="{escaped(file)}">'
        + (f'<div class="image">{picture}</div>' if picture else "")
        + f"<div><small>{escaped(' · '.join(filter(None, about)))}{blind}</small>"
        f'<p class="question text">{escaped(plain(group["question"]))}</p><p class="soft">true answer: '
        f'<code class="text">{escaped(truth)}</code></p><ul class="completions">{"".join(items)}</ul></div></article>'
    )


def answer_section(answers: Sequence[dict], images: Thumbnails, of_run: str = "") -> str:
    """The answers of the last evaluation, failures first, and how often each kind of failure occurs."""
    if not answers:
        return f"<h2>Evaluation{of_run}</h2><p>There are no answers: answers.jsonl is missing or empty.</p>"
    sets = dict.fromkeys(row["set"] for row in answers)
    parts, seen = [f"<h2>Evaluation{of_run} at step {answers[0]['step']:,}</h2>"], Counter()
    for name in sets:
        rows = [row for row in answers if row["set"] == name]
        counts = Counter(kind for row in rows for kind in row["kinds"])
        seen += counts
        bars = [
            f'<span>{kind}</span><i class="{kind}" style="width:{100 * counts[kind] / len(rows):.1f}%"></i>'
            f"<span>{counts[kind] / len(rows):.0%} <small>{counts[kind]} of {len(rows)}</small></span>"
            for kind in KINDS
            if counts[kind]
        ]
        sampled = f" <small>{len(rows)} of {rows[0]['of']} answers</small>" if rows[0]["of"] > len(rows) else ""
        parts.append(f'<h3>{escaped(name)}{sampled}</h3><div class="kinds">{"".join(bars)}</div>')
    kinds = [("", "all"), *((kind, kind) for kind in KINDS if seen[kind])]
    controls = [field("kind", select("kind", kinds))]
    if len(sets) > 1:
        controls.append(field("set", select("set", [("", "all"), *((name, name) for name in sets)])))
    shown = [row for row in answers if row["shown"]]
    parts.append(f'<form class="answer-filters controls needs-js">{"".join(controls)}<output></output></form>')
    return "".join(parts) + f'<div class="gallery">{"".join(show_answer(row, images) for row in shown)}</div>'


def show_answer(row: dict, images: Thumbnails) -> str:
    """A card of the gallery."""
    kinds, right = row["kinds"], "right" if row["kinds"] == ["right"] else ""
    head = f'<article class="answer" data-set="{escaped(row["set"])}" data-kinds="{"|".join(kinds)}">'
    if "bad_sample" in row:
        return f'{head}<p class="verdict">{kinds[0]}</p><p class="soft text">{escaped(row["bad_sample"])}</p></article>'
    true, predicted = scored_marks(row)
    picture = images.picture(row, true, [(0, advantage_colour(1.0 if right else -1.0), mark) for mark in predicted])
    score = [f"{name} {number(row[key])}" for name, key in (("IoU", "iou"), ("reward", "reward")) if key in row]
    verdict = ", ".join([*kinds, *score]) + (", cut off" if row["truncated"] else "")
    return (
        f'{head}{picture}<p class="verdict {right}">{escaped(verdict)}</p>'
        f'<p class="question text">{escaped(plain(row["question"]), 400)}</p><details><summary>answer</summary>'
        f'<code class="text">{escaped(row["completion"])}</code><p class="soft">true answer: '
        f'<code class="text">{escaped(row["truth"])}</code></p></details><small>{escaped(row["set"])}, '
        f"{escaped(row['id'])}</small></article>"
    )
