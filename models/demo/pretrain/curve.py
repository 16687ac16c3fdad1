"""Draws loss-curve.svg from training-log.jsonl: loss on held-out rows against tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pretrain import LOG_NAME

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 44, 50
LOWEST, HIGHEST = 0.01, 10.0  # of the logarithmic axis
# role: (name in the legend, colour)
ROLES = {
    "context": ("signals and inputs", "#4477aa"),
    "unknown": ("outputs before the task can be known", "#aa7733"),
    "known": ("outputs of a known task", "#228833"),
}


def draw(records: list[dict]) -> str:
    """The SVG of the curves."""
    end = max(record["tokens"] for record in records)

    def x(tokens: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * tokens / end

    def y(loss: float) -> float:
        share = math.log(loss / LOWEST) / math.log(HIGHEST / LOWEST)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in (0.01, 0.1, 1, 10):
        parts.append(f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss}</text>')
    for millions in range(0, int(end / 1e6) + 1, 2):
        place = f'x="{x(millions * 1e6):.1f}" y="{HEIGHT - BOTTOM + 18}"'
        parts.append(f'<text {place} text-anchor="middle">{millions}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">million tokens</text>')
    parts.append(f'<text x="{LEFT}" y="20">loss on held-out rows (nats a token)</text>')
    for row, (role, (label, colour)) in enumerate(ROLES.items()):
        points = " ".join(
            f"{x(record['tokens']):.1f},{y(record['validation'][role]):.1f}" for record in records
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        height = TOP + 14 + 18 * row
        parts.append(f'<path d="M{WIDTH - 290} {height - 4}h24" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - 258}" y="{height}">{label}</text>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def main() -> None:
    here = Path(__file__).resolve().parent
    records = [json.loads(line) for line in (here / LOG_NAME).read_text().splitlines()]
    (here.parent / "loss-curve.svg").write_text(draw(records))


if __name__ == "__main__":
    main()
