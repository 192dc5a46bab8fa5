"""Curves as inline SVG in one HTML page: no script, no network, light and dark, any width."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
MAX_POINTS = 500  # of a line; more are averaged
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 46, 10, 10, 22  # of a chart, in its own units


@dataclass(frozen=True)
class Chart:
    """One picture: named lines over the iteration, on a logarithmic y axis if asked and needed."""

    title: str
    lines: Mapping[str, Points]
    log: bool = False


def downsample(points: Points, limit: int = MAX_POINTS) -> Points:
    """Means of as many equal stretches as allowed; all points if they are few."""
    if len(points) <= limit:
        return points
    edges = [round(i * len(points) / limit) for i in range(limit + 1)]
    stretches = (points[a:b] for a, b in itertools.pairwise(edges))
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
        for part in stretches
    ]


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
    log = chart.log and low > 0 and high > 20 * low

    def across(x: float) -> float:
        return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        scale = math.log10 if log else float
        share = (scale(y) - scale(low)) / (scale(high) - scale(low))
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks(low, high, log):
        y = up(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" class="end">{_short(tick)}</text>')
    for x, where in dict(zip(span, ("start", "end"), strict=True)).items():
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - 6}" class="{where}">{x:,.0f}</text>')
    for name, x in marks.items():
        if left <= x <= right:
            parts.append(
                f'<path class="mark" d="M{across(x):.1f} {TOP}V{HEIGHT - BOTTOM}">'
                f"<title>{escape(name)}</title></path>"
            )
    for number, line in enumerate(lines.values()):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)
        if len(line) == 1:
            x, y = line[0]
            parts.append(f'<circle class="c{number}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2"/>')
        else:
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


def _short(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-") if 0 < abs(number) < 1e-3 else f"{number:,.6g}"


def figure(chart: Chart, marks: Mapping[str, float], span: tuple[float, float]) -> str:
    """A chart with its title and a legend that tells each line's last value."""
    legend = "".join(
        f'<li><i class="c{number}"></i>{escape(name)} <b>{line[-1][1]:.4g}</b></li>'
        for number, (name, line) in enumerate(chart.lines.items())
    )
    return (
        f"<figure><figcaption>{escape(chart.title)}</figcaption>"
        f"<ul>{legend}</ul>{svg(chart, marks, span)}</figure>\n"
    )


def page(
    title: str,
    facts: Mapping[str, str],
    warnings: Sequence[str],
    charts: Sequence[Chart],
    marks: Mapping[str, float],
    footer: str,
) -> str:
    """The whole document; a chart without points is left out, all others share their x axis."""
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    notes = "".join(f"<li>{escape(line)}</li>" for line in warnings)
    shown = [
        Chart(chart.title, {k: v for k, v in chart.lines.items() if v}, chart.log)
        for chart in charts
    ]
    xs = [x for chart in shown for line in chart.lines.values() for x, _ in line]
    span = (min(xs, default=0.0), max(xs, default=0.0))
    figures = "".join(figure(chart, marks, span) for chart in shown if chart.lines)
    key = "".join(f'<li><i class="dash"></i>{escape(k)}: {v:,.0f}</li>' for k, v in marks.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style></head>
<body><main>
<h1>{escape(title)}</h1>
<dl>{rows}</dl>
{f'<ul class="warnings">{notes}</ul>' if notes else ""}
{f'<ul class="key">{key}</ul>' if key else ""}
<section>
{figures}</section>
<footer>{escape(footer)}</footer>
</main></body></html>
"""


STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1c2128; --soft: #5b6573;
  --line: #dfe3e8; --warn: #fff3d6; --edge: #d99a1c;
  --c0: #1f6feb; --c1: #d1570a; --c2: #1a8f5a; --c3: #8b4fd1; }
@media (prefers-color-scheme: dark) { :root { --back: #0f1318; --card: #181d24; --text: #e4e8ee;
  --soft: #98a3b1; --line: #2b323c; --warn: #3a2f14; --edge: #d99a1c;
  --c0: #62a4ff; --c1: #ff9a55; --c2: #4ccb92; --c3: #c295ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.3rem; margin: 0 0 12px; overflow-wrap: anywhere; }
ul { list-style: none; margin: 0; padding: 0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 8px;
  margin: 0 0 12px; }
dl div, figure, .warnings li { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 8px 12px; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.warnings li { background: var(--warn); border-left: 4px solid var(--edge); margin-bottom: 8px; }
.key, footer { color: var(--soft); font-size: .8rem; margin: 4px 0 12px; }
section { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; }
figcaption { font-weight: 600; }
figure ul { display: flex; flex-wrap: wrap; gap: 0 14px; color: var(--soft); font-size: .8rem; }
figure b { color: var(--text); }
i { display: inline-block; width: 14px; height: 3px; margin-right: 5px; vertical-align: middle; }
i.dash { border-left: 2px dashed var(--soft); width: 0; height: 14px; margin: 0 8px 0 6px; }
i.c0 { background: var(--c0); } i.c1 { background: var(--c1); }
i.c2 { background: var(--c2); } i.c3 { background: var(--c3); }
svg { display: block; width: 100%; height: auto; margin-top: 4px; }
text { fill: var(--soft); font-size: 10px; }
.start { text-anchor: start; } .end { text-anchor: end; }
.grid { stroke: var(--line); } .mark { stroke: var(--soft); stroke-dasharray: 4 3; }
polyline { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
polyline.c0 { stroke: var(--c0); } polyline.c1 { stroke: var(--c1); }
polyline.c2 { stroke: var(--c2); } polyline.c3 { stroke: var(--c3); }
circle.c0 { fill: var(--c0); } circle.c1 { fill: var(--c1); }
circle.c2 { fill: var(--c2); } circle.c3 { fill: var(--c3); }
"""
