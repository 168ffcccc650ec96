"""A waterfall of stages as an SVG text: each bar begins where the one above ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 860, 120, 170, 76, 30
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 }
.faint { fill: #656d76; font-size: 12px }
.paper { fill: #ffffff }
.bar { fill: #4477aa }
.limit { fill: #e07b39 }
.thread { stroke: #8c959f; stroke-dasharray: 2 3 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.faint { fill: #9198a1 }
.paper { fill: #0d1117 }
.bar { fill: #6ea8dc }
.limit { fill: #f2a65a }
.thread { stroke: #656c76 }
}
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """A stage, its seconds, and those it would take at best, None where nothing limits it."""

    name: str
    seconds: float
    limit_s: float | None


def waterfall(title: str, bars: Sequence[Bar], unit: str) -> str:
    """Return the drawing: a bar for each stage with its share and, inside it, its limit.

    `unit` names the axis. The same figures give the same text.
    """
    total = sum(bar.seconds for bar in bars) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / total
    height = _TOP + _ROW * len(bars) + 16
    legend = f"{unit}, {total:.3g} in all; orange: what it would take at this machine's limit"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" role="img" aria-label="{escape(title, _QUOTES)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
        f'<text class="title" x="16" y="28">{escape(title)}</text>',
        f'<text class="faint" x="16" y="50">{escape(legend)}</text>',
    ]
    begin = float(_LEFT)
    for row, bar in enumerate(bars):
        parts += _bar(bar, begin, scale, total, _TOP + _ROW * row, last=row == len(bars) - 1)
        begin += bar.seconds * scale
    return "\n".join([*parts, "</svg>"]) + "\n"


_QUOTES = {'"': "&quot;"}


def _bar(bar: Bar, begin: float, scale: float, total: float, top: int, *, last: bool) -> list[str]:
    width = max(1.0, bar.seconds * scale)
    end = begin + bar.seconds * scale
    figures = f"{bar.seconds:.3g} s, {100 * bar.seconds / total:.1f} %"
    parts = [
        f'<text x="16" y="{top + 15}">{escape(bar.name)}</text>',
        f'<rect class="bar" x="{begin:.1f}" y="{top}" width="{width:.1f}" height="20"/>',
        f'<text x="{begin + width + 8:.1f}" y="{top + 15}">{escape(figures)}</text>',
    ]
    if bar.limit_s is not None:
        limit = min(width, max(1.0, bar.limit_s * scale))
        parts.append(f'<rect class="limit" x="{begin:.1f}" y="{top + 14}" width="{limit:.1f}" height="6"/>')
    if not last:
        parts.append(
            f'<line class="thread" x1="{end:.1f}" x2="{end:.1f}" y1="{top + 20}" y2="{top + _ROW}"/>'
        )
    return parts
