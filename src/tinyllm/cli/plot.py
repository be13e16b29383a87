"""The picture of `tinyllm compare`: size and speed against quality. Imports matplotlib, an extra."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

from tinyllm.errors import ArgumentError, UnsupportedError, install_text
from tinyllm.files.outfiles import replacing, target_of

FLOAT, QUANTIZED, GRID = "#7f7f7f", "#1f5f99", "#dddddd"
# where a label may begin (right of a point) or end (left of it), in points from the point
PLACES = [
    (side * dx, dy)
    for dx in (6, 16, 28, 42)
    for dy in (0, 8, -8, 16, -16, 26, -26, 38, -38)
    for side in (1, -1)
    if dx > 6 or abs(dy) <= 8
]


def require(path: str) -> None:
    """Raises before anything is measured: UnsupportedError without matplotlib, ArgumentError for a file type
    that it cannot write, WriteError for a place where no file can be.
    """
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError(
            f"plots need matplotlib, which is not installed: {install_text('plot')}"
        ) from None
    matplotlib.use("Agg")
    from matplotlib.backend_bases import FigureCanvasBase

    types = FigureCanvasBase.get_supported_filetypes()
    if _type(path) not in types:
        raise ArgumentError(f"{path}: a plot is a file of type .png, or .{', .'.join(sorted(types))}")
    target_of(path)


def _type(path: str) -> str:
    return Path(path).suffix[1:].lower()


def draw(records: list[dict[str, Any]], path: str) -> None:
    """Writes a PNG (or what the name ends in) from records of `compare.Row`: KL divergence from the
    reference over size, and over decoding speed; the reference is a line. The file appears when it is
    complete. Raises what `require` does.
    """
    require(path)
    from matplotlib import pyplot

    points = [record for record in records if (record["quality"] or {}).get("divergence")]
    reference = next(record for record in records if record["is_reference"])
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 5), sharey=True, layout="constrained")
        unit, size = _size_axis(records)
        _panel(left, points, reference, size, lambda r: r["size_bytes"] / unit)
        _panel(right, points, reference, "decoding, tokens a second", lambda r: r["decode"]["median_ts"])
        left.set_ylabel(f"KL divergence from {reference['model']}, nats a token\n(lower is better)")
        left.set_title("smaller is to the left", loc="left", fontsize=9, color=FLOAT)
        right.set_title("faster is to the right", loc="left", fontsize=9, color=FLOAT)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=110, format=_type(path))
        pyplot.close(figure)
    with replacing(path, drawn.tell()) as file:
        file.write(drawn.getvalue())


def _size_axis(records: list[dict[str, Any]]) -> tuple[float, str]:
    """How many bytes its unit has, and its name; where the models have equally many weights, sizes are bits a
    weight, and the name says how many."""
    unit, name = (1e9, "GB") if max(record["size_bytes"] for record in records) >= 1e9 else (1e6, "MB")
    n_params = {record["n_params"] for record in records}
    at_8_bits = f" (8 bits a weight: {n_params.pop() / unit:.3g} {name})" if len(n_params) == 1 else ""
    return unit, f"size, {name}{at_8_bits}"


def _panel(axes: Any, points: list[dict[str, Any]], reference: dict[str, Any], name: str, x: Any) -> None:
    from matplotlib import ticker

    xs = [x(point) for point in points]
    kl = [point["quality"]["divergence"]["kl"] for point in points]
    ys = [max(k["value"], 1e-9) for k in kl]
    axes.set_yscale("log")
    if max(xs) > 3 * min(xs):
        axes.set_xscale("log")
        few = max(xs) > 10 * min(xs)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1, 2, 3, 4, 5, 6, 8)))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(True, which="major", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.errorbar(
        xs, ys, yerr=[k["error"] for k in kl], fmt="o", markersize=5, color=QUANTIZED, elinewidth=0.8
    )
    axes.axvline(x(reference), color=FLOAT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel(name)
    axes.margins(x=0.16, y=0.1)
    axes.annotate(
        reference["model"], (x(reference), 1), xycoords=("data", "axes fraction"), xytext=(-4, -2),
        textcoords="offset points", ha="right", va="top", color=FLOAT, fontsize=8, rotation=90,
    )  # fmt: skip
    _label(axes, points, xs, ys)


def _label(axes: Any, points: list[dict[str, Any]], xs: list[float], ys: list[float]) -> None:
    """A name beside each point: at the first of some places, ever farther, where nothing is in its way."""
    axes.figure.canvas.draw()
    scale = 72 / axes.figure.dpi
    at = [axes.transData.transform((x, y)) * scale for x, y in zip(xs, ys, strict=True)]
    taken = [_Box(x - 3.5, x + 3.5, y - 3.5, y + 3.5) for x, y in at]
    for point, x, y, (left, bottom) in zip(points, xs, ys, at, strict=True):
        width = 4.9 * len(point["model"]) + 2
        for dx, dy in PLACES:
            start = left + (dx if dx > 0 else dx - width)
            box = _Box(start, start + width, bottom + dy - 5, bottom + dy + 5)
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        axes.annotate(
            point["model"], (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=8,
            va="center", ha="left" if dx > 0 else "right",
            arrowprops={"arrowstyle": "-", "color": FLOAT, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip


class _Box(NamedTuple):
    """A rectangle in points."""

    left: float
    right: float
    bottom: float
    top: float

    def overlaps(self, other: _Box) -> bool:
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.top <= other.bottom or other.top <= self.bottom)
