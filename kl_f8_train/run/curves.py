"""Curves as inline SVG in one HTML page: no script, no network, light and dark, any width."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from kl_f8_train.output import rendered
from kl_f8_train.units import figure

STATUS_PAGE = Path(__file__).with_name("status.html")
Points = Sequence[tuple[float, float]]
MAX_POINTS = 500  # of a line; more are averaged
RECENT = 0.1  # share of the rows that "lately" means
LINE_COLOURS = 4  # that the page has; further lines repeat them
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 46, 10, 10, 22  # of a chart, in its own units


@dataclass(frozen=True)
class Chart:
    """One picture: named lines over the iteration, on a logarithmic y axis if asked and needed."""

    title: str
    lines: Mapping[str, Points]
    log: bool = False
    percent: bool = False  # its values are in %


def downsample(points: Points, limit: int = MAX_POINTS) -> Points:
    """Means of as many equal stretches as allowed; all points if they are few."""
    if len(points) <= limit:
        return points
    # Stretches of iterations, not every n-th point: a mean shows the level, a sample the noise.
    edges = [round(i * len(points) / limit) for i in range(limit + 1)]
    means = []
    for first, end in itertools.pairwise(edges):
        xs, ys = zip(*points[first:end], strict=True)
        means.append((sum(xs) / len(xs), sum(ys) / len(ys)))
    return means


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Round numbers in [low, high], three to six."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1, 2, 5), (1,)):
            found = [f * 10.0**power for power in powers for f in factors]
            found = [number for number in found if low <= number <= high]
            if len(found) <= 6:
                return found
        return found[:: 1 + len(found) // 6]
    # The largest of 1, 2 and 5 times a power of ten that gives three steps or more.
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(factor * power for factor in (1, 2, 5) if factor * power <= rough * (1 + 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [number * step for number in numbers]


def svg(chart: Chart, marks: Mapping[str, float], span: tuple[float, float]) -> str:
    """A chart over the x of `span`; `marks` are vertical lines, name -> x, drawn where inside."""
    lines = {name: downsample(line) for name, line in chart.lines.items()}
    ys = [y for line in lines.values() for _, y in line]
    left, right = _widened(*span)
    low, high = _widened(min(ys), max(ys))
    log = chart.log and low > 0 and high > 20 * low  # a smaller range reads better linearly

    def across(x: float) -> float:
        return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        scale = math.log10 if log else float
        share = (scale(y) - scale(low)) / (scale(high) - scale(low))
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = []  # grid lines with their values, the iteration's axis, marks, then the curves
    numbers = ticks(low, high, log)
    for tick, label in zip(numbers, _labels(numbers), strict=True):
        y = up(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" class="end">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" class="middle">iteration</text>')
    for x, where in dict(zip(span, ("start", "end"), strict=True)).items():
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - 6}" class="{where}">{x:,.0f}</text>')
    for name, x in marks.items():
        if left <= x <= right:
            parts.append(
                f'<path class="mark" d="M{across(x):.1f} {TOP}V{HEIGHT - BOTTOM}">'
                f"<title>{escape(name)}</title></path>"
            )
    for number, line in zip(itertools.cycle(range(LINE_COLOURS)), lines.values(), strict=False):
        if len(line) == 1:
            x, y = line[0]
            parts.append(f'<circle class="c{number}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2"/>')
        else:
            path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)
            parts.append(f'<polyline class="c{number}" points="{path}"/>')
    label = escape(f"{chart.title}: {', '.join(lines)}", quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty, nor only the rounding of one value."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    return (0.0, 1.0) if low == 0 else (low - abs(low) / 2, low + abs(low) / 2)


def _labels(numbers: Sequence[float]) -> list[str]:
    """Labels of an axis, with as few digits as distinguish them."""
    labels: list[str] = []
    for digits in range(6):
        labels = [_short(number, digits) for number in numbers]
        if len(set(labels)) == len(numbers):
            break
    return labels


def _short(number: float, digits: int) -> str:
    small = 0 < abs(number) < 1e-3
    return f"{number:.{digits}e}".replace("e-0", "e-") if small else f"{number:,.6g}"


def _mean_lately(chart: Chart, line: Points) -> str:
    """As `status` says it in words: the mean of the last tenth."""
    last = line[-max(1, round(RECENT * len(line))) :]
    mean = sum(y for _, y in last) / len(last)
    return f"{mean:.1f} %" if chart.percent else figure(mean)


def page(
    title: str,
    facts: Mapping[str, str],
    warnings: Sequence[str],
    charts: Sequence[Chart],
    marks: Mapping[str, float],
    footer: str,
    pictures: Mapping[str, str] | None = None,
) -> str:
    """The whole document; a chart without points is left out, all others share their x axis.

    `pictures` are shown in their order, title -> data URI.
    """
    points = itertools.chain(*(line for chart in charts for line in chart.lines.values()))
    xs = [x for x, _ in points]
    span = (min(xs, default=0.0), max(xs, default=0.0))
    figures = []
    for chart in charts:
        lines = {name: line for name, line in chart.lines.items() if line}
        if lines:
            legend = {name: _mean_lately(chart, line) for name, line in lines.items()}
            picture = svg(replace(chart, lines=lines), marks, span)
            figures.append({"title": chart.title, "legend": legend, "svg": picture})
    return rendered(
        STATUS_PAGE,
        {
            "title": title,
            "facts": facts,
            "warnings": warnings,
            "figures": figures,
            "marks": marks,
            "pictures": pictures or {},
            "footer": footer,
        },
    )
