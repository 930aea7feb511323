"""The parts of a page that shows runs and pictures; its style and script are report.css and report.js.

A page is one file that asks the network for nothing and is readable without its script. Every text comes from a model
or a data set, so `escaped` stands around each; the page's policy also lets the browser run no script but ours.
"""

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_POINTS = 300  # of a curve; a longer one is drawn by the least and the largest value of each stretch
MAX_TEXT = 1_500  # characters of a completion
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 180, 42, 16, 8, 20  # of a chart
COLOURS = 6  # --c0 to --c5 in report.css


class Mark(NamedTuple):
    """A box in pixels of the image, or a point: a box without area."""

    box: list[float]
    label: str


@dataclass(frozen=True)
class Line:
    """A curve of a chart."""

    name: str
    steps: np.ndarray  # [n]
    values: np.ndarray  # [n]
    interval: np.ndarray | None = None  # [n, 2]
    start: float | None = None  # the value before training
    dashed: bool = False


@dataclass(frozen=True)
class Picture:
    """An image with what is drawn on it."""

    uri: str  # "" if there is no image to show
    size: tuple[int, int]  # of the original image, in whose pixels the marks are
    true: Sequence[Mark] = ()
    predicted: Sequence[tuple[int, str, Mark]] = ()  # (number of its completion, colour, mark)


def escaped(value: object, limit: int = MAX_TEXT) -> str:
    """The text as HTML, also inside a quoted attribute; the middle of a long one is left out."""
    text = str(value).replace("\0", "\ufffd")
    if len(text) > limit:
        text = f"{text[: limit * 2 // 3]} [... {len(text) - limit:,} characters ...] {text[-limit // 3 :]}"
    return html.escape(text)


def figure_name(key: str) -> str:
    """A key of the log as a reader writes it."""
    written = {"iou": "IoU", "map": "mAP", "kl": "KL", "std": "deviation"}
    return " ".join(written.get(word, word) for word in key.split("_"))


def number(value: float | None) -> str:
    """A figure in few characters."""
    if value is None or not math.isfinite(value):
        return "-"
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def page(title: str, sections: Sequence[str]) -> str:
    """The whole page."""
    here, body = Path(__file__).parent, "\n".join(sections)
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    frame = {"width": WIDTH, "left": LEFT, "right": RIGHT}
    script = f"const frame = {json.dumps(frame)};\n{script}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><link rel="icon" href="data:,"><title>{escaped(title)}</title>'
        f"<style>{style}</style></head>\n<body>\n{body}\n<script>{script}</script></body></html>\n"
    )
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts that are not HTML."""
    cells = [
        [(f"<td>{escaped(cell)}</td>" if len(cell) < 60 else f'<td class="long">{escaped(cell)}</td>') for cell in row]
        for row in rows
    ]
    lines = [f"<tr>{''.join(row)}</tr>" for row in cells]
    heads = "".join(f"<th>{escaped(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


# ---- curves --------------------------------------------------------------------------------------------------------


def chart(title: str, note: str, lines: Sequence[Line]) -> str:
    """A figure with its curves, and under it the last value of each, or the one under the pointer."""
    x0, x1 = min(line.steps[0] for line in lines), max(line.steps[-1] for line in lines)
    y0, y1 = _value_range(lines)
    x1 = max(x1, x0 + 1)

    def points(steps: np.ndarray, values: np.ndarray) -> str:
        x = LEFT + (steps - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (np.clip(values, y0, y1) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))

    drawn, keys, told = [_axes(x0, x1, y0, y1)], [], []
    for place, line in enumerate(lines):
        style = f'style="--c:var(--c{place % COLOURS})"' + (' stroke-dasharray="5 3"' if line.dashed else "")
        if line.start is not None:
            level = points(np.array([x0, x1]), np.array([line.start] * 2))
            drawn.append(f'<polyline class="start" {style} points="{level}"/>')
        if line.interval is not None:
            low, high = line.interval.T
            edge = points(np.append(line.steps, line.steps[::-1]), np.append(low, high[::-1]))
            drawn.append(f'<polygon class="band" {style} points="{edge}"/>')
        steps, values = _extremes(line.steps, line.values)
        smooth = _smoothed(np.clip(line.values, y0, y1)) if len(line.values) >= 20 else None
        kind = "alone" if smooth is None else "raw"
        drawn.append(f'<polyline class="{kind}" {style} points="{points(steps, values)}"/>')
        if smooth is not None:
            chosen = np.unique(np.linspace(0, len(smooth) - 1, MAX_POINTS).astype(int))
            drawn.append(f'<polyline class="smooth" {style} points="{points(line.steps[chosen], smooth[chosen])}"/>')
        if len(line.values) <= 30:
            for dot in points(line.steps, line.values).split():
                x, y = dot.split(",")
                drawn.append(f'<circle {style} cx="{x}" cy="{y}" r="2.2"/>')
        told.append(_told(line))
        keys.append(f'<span class="key" {style}>{escaped(line.name)} <b>{number(line.values[-1])}</b></span>')
    data = json.dumps({"range": [float(x0), float(x1)], "lines": told}).replace("<", "\\u003c")
    return (
        f'<figure class="chart"><figcaption>{escaped(title)} <small>{escaped(note)}</small></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(title)}">{"".join(drawn)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f'<div class="keys">{"".join(keys)}</div><script type="application/json">{data}</script></figure>'
    )


def _value_range(lines: Sequence[Line]) -> tuple[float, float]:
    """The lowest and highest value shown; in a long run one spike must not flatten the rest."""
    low, high = [], []
    for line in lines:
        outside = 0.2 if len(line.values) > 200 else 0
        low.append(np.percentile(line.values, outside))
        high.append(np.percentile(line.values, 100 - outside))
        if line.interval is not None:
            low.append(line.interval[:, 0].min())
            high.append(line.interval[:, 1].max())
        if line.start is not None:
            low.append(line.start)
            high.append(line.start)
    least, most = float(min(low)), float(max(high))
    if most == least:
        least, most = min(0.0, 2 * least), max(0.0, 2 * most) or 1.0
    margin = 0.05 * (most - least)
    bottom = least - margin
    return (0.0 if least >= 0 > bottom else bottom), most + margin


def _axes(x0: float, x1: float, y0: float, y1: float) -> str:
    parts = []
    for value in _ticks(y0, y1, 4):
        y = HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{number(value)}</text>')
    for value in _ticks(x0, x1, 5):
        x = LEFT + (value - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{value:,.0f}</text>')
    return "".join(parts)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between the two."""
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= raw)
    return [value * size for value in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean over a twentieth of the curve around each point; unlike a running mean it does not lag."""
    half = max(2, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _stretches(count: int, most: int) -> list[slice]:
    edges = np.linspace(0, count, min(count, most) + 1).astype(int).tolist()
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def _extremes(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value of each stretch in their order, so that no spike is lost."""
    if len(values) <= MAX_POINTS:
        return steps, values
    kept = []
    for part in _stretches(len(values), MAX_POINTS // 2):
        kept += sorted({part.start + int(values[part].argmin()), part.start + int(values[part].argmax())})
    return steps[kept], values[kept]


def _told(line: Line) -> list:
    """[step, value, low, high] of each point that the pointer reads: the mean over a stretch in a long run."""
    rows = []
    for part in _stretches(len(line.values), MAX_POINTS):
        row = [float(line.steps[part][-1]), float(f"{line.values[part].mean():.5g}")]
        if line.interval is not None:
            row += [float(f"{edge:.4g}") for edge in line.interval[part][-1]]
        rows.append(row)
    return rows


# ---- pictures ------------------------------------------------------------------------------------------------------


def advantage_colour(advantage: float) -> str:
    """From orange (worse than its group) through grey to blue (better)."""
    share = max(-1.0, min(1.0, (advantage if math.isfinite(advantage) else 0.0)))
    end, grey = ((28, 110, 230) if share > 0 else (240, 90, 10)), (150, 156, 164)
    return "#" + "".join(f"{round(g + (e - g) * abs(share)):02x}" for g, e in zip(grey, end, strict=True))


def show_picture(picture: Picture) -> str:
    """The image under its marks, which stay sharp at any size."""
    width, height = picture.size
    parts = []
    for completion, colour, mark in picture.predicted:
        style = f'data-k="{completion}" style="--c:{colour}"'
        parts.append(_shape(mark, "predicted", style, picture.size))
    parts += [_shape(mark, "true", "", picture.size) for mark in picture.true]  # on top: predictions would hide it
    small = " small" if max(width, height) <= 160 else ""
    image = f'<img src="{picture.uri}" alt="" loading="lazy">' if picture.uri else ""
    return (
        f'<div class="shot{small}" style="aspect-ratio:{width}/{height}">{image}'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{"".join(parts)}</svg></div>'
    )


def _shape(mark: Mark, kind: str, attributes: str, size: tuple[int, int]) -> str:
    """A box or a point, on a dark line that keeps it visible on any ground."""
    width, height = size
    x1, y1, x2, y2 = (
        min(max(side, -0.5 * limit), 1.5 * limit)
        for side, limit in zip(mark.box, (width, height, width, height), strict=True)
    )
    if mark.box[:2] == mark.box[2:]:
        radius = max(width, height) / 60
        outline = f'<circle cx="{x1:.2f}" cy="{y1:.2f}" r="{radius:.2f}"'
    else:
        corner = f'x="{min(x1, x2):.2f}" y="{min(y1, y2):.2f}"'
        outline = f'<rect {corner} width="{abs(x2 - x1):.2f}" height="{abs(y2 - y1):.2f}"'
    tip = f"<title>{escaped(mark.label, 80)}</title>" if mark.label else ""
    label = ""
    if mark.label:
        scale = max(width, height) / 300  # the text's size in pixels of the image
        label = (
            f'<text x="{min(x1, x2) + 3 * scale:.2f}" y="{min(y1, y2) + 13 * scale:.2f}" '
            f'style="font-size:{12 * scale:.2f}px;stroke-width:{3 * scale:.2f}px">{escaped(mark.label, 40)}</text>'
        )
    layers = "".join(f'{outline} class="{layer}"/>' for layer in ("under", "over", "reach"))
    return f'<g class="{kind}" {attributes}>{tip}{layers}{label}</g>'


def legend() -> str:
    """What the colours on a picture mean."""
    swatches = "".join(f'<i style="background:{advantage_colour(value / 3)}"></i>' for value in range(-3, 4))
    return (
        '<p class="legend"><span class="swatch true"></span> true box &nbsp; worse than its group '
        f'<span class="scale">{swatches}</span> better (the advantage)</p>'
    )


def field(label: str, control: str) -> str:
    """A control of a filter with its name."""
    return f"<label>{escaped(label)} {control}</label>"


def select(name: str, choices: Sequence[tuple[str, str]]) -> str:
    """A list to choose from, of (value, text)."""
    options = "".join(f'<option value="{escaped(value)}">{escaped(text)}</option>' for value, text in choices)
    return f'<select name="{name}">{options}</select>'
