"""What may come next (engine/next_token.py), as lines for a terminal or a picture.

Imports common.py, and matplotlib only to draw. Read next: inspect.py.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tinyllm.cli.common import BOLD, CYAN, DIM, UsageError, styled

if TYPE_CHECKING:
    from tinyllm.engine.next_token import NextToken

_EIGHTHS = " ▏▎▍▌▋▊▉"
_MOST_NAME = 16


def lines(found: NextToken, names: list[str], n_rows: int) -> Iterator[str]:
    """A table for the terminal: a row a token, a bar a temperature, and what becomes of it."""
    from rich.cells import cell_len, set_cell_size

    n_rows = min(n_rows, len(found.ids))
    name_width = min(_MOST_NAME, max(8, *(cell_len(name) for name in names[:n_rows])))
    droppers = [found.dropped_by(rank) for rank in range(n_rows)]
    verdicts = ["kept" if name is None else f"dropped by {name.split()[0]}" for name in droppers]
    verdict_width = max(map(len, verdicts))
    n_columns = len(found.temperatures)
    room = shutil.get_terminal_size((100, 40)).columns - name_width - verdict_width - 2
    bar_width = max(4, min(30, room // n_columns - 10))
    most = found.probabilities.max()

    head = "".join(f"  {f'temperature {t:g}':<{bar_width + 8}}" for t in found.temperatures)
    yield styled(" " * name_width + head.rstrip(), DIM, sys.stdout)
    for rank in range(n_rows):
        is_kept = droppers[rank] is None
        name = set_cell_size(names[rank], name_width)
        row = styled(name, BOLD, sys.stdout) if is_kept else styled(name, DIM, sys.stdout)
        for p in found.probabilities[:, rank]:
            bar = styled(_bar(p / most, bar_width), CYAN if is_kept else DIM, sys.stdout)
            row += f"  {bar} {percent(p):>7}"
        yield row + "  " + styled(verdicts[rank], "" if is_kept else DIM, sys.stdout)
    if len(found.ids) > n_rows:
        row = f"{'others':<{name_width}}"
        for p in found.probabilities[:, n_rows:].sum(axis=1):
            row += f"  {'':<{bar_width}} {percent(p):>7}"
        yield styled(row, DIM, sys.stdout)
    yield ""
    yield from summary(found)


def summary(found: NextToken) -> list[str]:
    """What the filters leave, in words."""
    steps = [f"{name} keeps {n}" for name, n in found.left]
    if not steps:
        return [f"all {len(found.ids)} tokens can be drawn"]
    kept = f"of {len(found.ids)} tokens {', then '.join(steps)}"
    return [kept, "(the filters look at temperature 1, so they keep the same tokens at any)"]


def percent(p: float) -> str:
    return f"{p:.1%}".replace("%", " %")


def _bar(share: float, width: int) -> str:
    """A bar of `share` of the width, in eighths of a character; a sliver where there is anything."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        from tinyllm.errors import install_text

        raise UsageError(f"--plot needs matplotlib: {install_text('plot')}") from None


def plot(found: NextToken, names: list[str], n_rows: int, title: str, path: str) -> None:
    """Draws the n_rows likeliest tokens, a panel a temperature, into a picture of the kind its name says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_rows = min(n_rows, len(found.ids))
    kept = [found.dropped_by(rank) is None for rank in range(n_rows)]
    figure = Figure(figsize=(1.5 + 3 * len(found.temperatures), 1.6 + 0.32 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found.temperatures), sharex=True, sharey=True, squeeze=False)[0]
    most = float(found.probabilities.max())
    for panel, temperature, p in zip(panels, found.temperatures, found.probabilities, strict=True):
        panel.barh(
            range(n_rows), p[:n_rows], color=["#2a6f97" if k else "#c9ced6" for k in kept], height=0.75
        )
        for rank in range(n_rows):
            panel.text(
                p[rank] + 0.015 * most, rank, percent(p[rank]), va="center", fontsize=8, color="#444444"
            )
        others = f"others: {percent(p[n_rows:].sum())}" if n_rows < len(p) else ""
        panel.text(1.25 * most, n_rows - 1, others, ha="right", va="center", fontsize=8, color="#444444")
        panel.set_title(f"temperature {temperature:g}", fontsize=10)
        panel.set_xlim(0, 1.25 * most)
        panel.set_xticks([])
        panel.tick_params(left=False)
        for side in ("top", "right", "bottom"):
            panel.spines[side].set_visible(False)
    panels[0].set_yticks(range(n_rows), [name.replace("$", r"\$") for name in names[:n_rows]])
    panels[0].invert_yaxis()
    figure.suptitle(title.replace("$", r"\$"), fontsize=12, fontweight="bold")
    figure.supxlabel("; ".join([*summary(found)[:1], "grey ones are dropped"]), fontsize=8)
    figure.savefig(path, dpi=150)
