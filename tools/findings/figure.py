"""Figures as SVG that needs nothing else: means with their intervals in panels, and the report page's curves."""

import math
import re
from collections.abc import Mapping, Sequence

from infra.report_page import Line, chart, escaped, number
from tools.findings.tables import Figures, interval

COLOURS = ("#1f6fb4", "#d2691e", "#2e8b57", "#8b3a8b", "#b8860b", "#555555")
ROW, NAME, PANEL, GAP, TOP = 20, 170, 150, 30, 48
CHART_WIDTH, CHART_HEIGHT = 360, 180  # of report_page.chart
STYLE = """<style>text{font:11px sans-serif;fill:#222} .bold{font-weight:bold} .grid{stroke:#ddd} .cursor{display:none}
polyline{fill:none;stroke:currentColor;stroke-width:2} .band{fill:currentColor;opacity:.15} circle{fill:currentColor}
</style>"""


def dots(title: str, figures: Figures, columns: Sequence[str]) -> str:
    """A panel for each column, in which each arm has its mean and interval; the first mean is a dashed line."""
    parts = [_text(NAME - 8, TOP + ROW * row + 14, arm, "end") for row, arm in enumerate(figures)]
    bottom = TOP + ROW * len(figures)
    for place, column in enumerate(columns):
        left = NAME + place * (PANEL + GAP)
        ends = {row: bar(values[column]) for row, values in enumerate(figures.values()) if column in values}
        if not ends:
            continue
        low, high = min(own[0] for own in ends.values()), max(own[2] for own in ends.values())
        scale = PANEL / ((high - low) or 1.0)
        parts.append(_text(left + PANEL / 2, TOP - 10, column, "middle", "bold"))
        parts.append(_text(left, bottom + 16, number(low), "start"))
        parts.append(_text(left + PANEL, bottom + 16, number(high), "end"))
        parts += [_line(x, TOP, x, bottom, 'class="grid"') for x in (left, left + PANEL)]
        first = left + (next(iter(ends.values()))[1] - low) * scale
        parts.append(_line(first, TOP, first, bottom, 'stroke="#888" stroke-dasharray="4 3"'))
        for row, own in ends.items():
            lower, middle, upper = (left + (edge - low) * scale for edge in own)
            y = TOP + ROW * row + 10
            parts.append(_line(lower, y, upper, y, f'stroke="{COLOURS[0]}" stroke-width="2"'))
            parts.append(f'<circle cx="{middle:.1f}" cy="{y}" r="3.5" color="{COLOURS[0]}"/>')
    return _page(title, NAME + len(columns) * (PANEL + GAP), bottom + 26, parts)


def bar(values: Sequence[float]) -> tuple[float, float, float]:
    """The ends of the interval and the mean between them; one value has no interval."""
    middle, half = interval(values)
    half = 0.0 if math.isinf(half) else half
    return middle - half, middle, middle + half


def curves(title: str, note: str, panels: Mapping[str, Sequence[Line]]) -> str:
    """The charts of the report page side by side, under one legend."""
    parts = []
    for place, line in enumerate(next(iter(panels.values()))):
        x = 12 + place * 200
        parts.append(_line(x, 34, x + 18, 34, f'stroke="{COLOURS[place]}" stroke-width="3"'))
        parts.append(_text(x + 24, 38, line.name, "start"))
    for place, (name, lines) in enumerate(panels.items()):
        left = place * CHART_WIDTH
        drawn = re.search(r"<svg .*?</svg>", chart(name, "", lines), re.DOTALL)[0]
        drawn = re.sub(r'style="--c:var\(--c(\d)\)"', lambda match: f'color="{COLOURS[int(match[1])]}"', drawn)
        parts.append(
            drawn.replace("<svg ", f'<svg x="{left}" y="66" width="{CHART_WIDTH}" height="{CHART_HEIGHT}" ', 1)
        )
        parts.append(_text(left + CHART_WIDTH / 2, 58, name, "middle", "bold"))
        parts.append(_text(left + CHART_WIDTH / 2, 70 + CHART_HEIGHT + 8, note, "middle"))
    return _page(title, len(panels) * CHART_WIDTH, 70 + CHART_HEIGHT + 18, parts)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escaped(text)}</text>'


def _page(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, STYLE, ground, _text(12, 18, title, "start", "bold"), *parts, "</svg>\n"])
