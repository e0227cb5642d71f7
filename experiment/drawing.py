"""The batches as a picture: time across, one bar for each request."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # needs no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from .measuring import Batch, Call

# From Okabe and Ito's palette, told apart with any colour vision, and hatched for print.
_ANSWERED: dict[str, Any] = {"facecolor": "#56B4E9"}
_FAILED: dict[str, Any] = {"facecolor": "#D55E00", "edgecolor": "white", "hatch": "////"}
_UNANSWERED: dict[str, Any] = {"facecolor": "#000000"}


def draw_timeline(batches: Sequence[Batch], path: Path, note: str) -> None:
    """Write the picture, as PNG: a row of panels for each side, a column for each number of calls.

    Args:
        batches: all sides with the same numbers of calls.
        path: where to.
        note: the small print: how it was measured.
    """
    sides = list(dict.fromkeys(batch.side for batch in batches))
    counts = list(dict.fromkeys(len(batch.calls) for batch in batches))
    latest = max(call.end for batch in batches for call in batch.calls)
    with plt.rc_context({"hatch.linewidth": 0.6, "font.size": 10}):
        figure, grid = plt.subplots(
            len(sides),
            len(counts),
            figsize=(1 + 4.5 * len(counts), 1.4 + 2.9 * len(sides)),
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        for batch in batches:
            _draw_batch(grid[sides.index(batch.side), counts.index(len(batch.calls))], batch)
        for panel in grid[-1]:
            panel.set_xlabel("seconds since the calls were sent")
            panel.set_xlim(0, latest * 1.02)
        for row in grid:
            row[0].set_ylabel("one bar for each request")
        figure.suptitle(_what_one_sees(batches), fontsize=13, fontweight="bold")
        legend = {"200, the users": _ANSWERED, "500 Internal Server Error": _FAILED}
        if any(_look(call) not in legend.values() for batch in batches for call in batch.calls):
            legend["another status, or none"] = _UNANSWERED
        figure.legend(
            handles=[Patch(label=label, **look) for label, look in legend.items()],
            loc="outside lower center",
            ncols=len(legend),
            frameon=False,
            title=note,
            title_fontproperties={"size": 8.5},
        )
        figure.savefig(path, format="png", dpi=110)
        plt.close(figure)


def _look(call: Call) -> dict[str, Any]:
    return _ANSWERED if call.succeeded else _FAILED if call.status == 500 else _UNANSWERED


def _draw_batch(panel: Axes, batch: Batch) -> None:
    calls = sorted(batch.calls, key=lambda call: call.end)
    # Gaps between the bars, and hatches, as long as the bars are thick enough.
    height = 0.8 if len(calls) <= 40 else 1.0
    for look in (_ANSWERED, _FAILED, _UNANSWERED):
        rows = [row for row, call in enumerate(calls) if _look(call) is look]
        bars = panel.barh(
            rows,
            [calls[row].end - calls[row].start for row in rows],
            left=[calls[row].start for row in rows],
            height=height,
            linewidth=0,
            **look,
        )
        if height == 1.0:
            for bar in bars:
                bar.set_hatch(None)
    if batch.failed:
        verdict = f"{batch.failed} of {len(calls)} calls fail{'s' if batch.failed == 1 else ''}"
    else:
        verdict = f"all {len(calls)} calls succeed"
    panel.set_title(f"{batch.side}: {verdict}", fontsize=10.5)
    panel.set_ylim(-0.7, len(calls) - 0.3)
    panel.set_yticks([])
    panel.spines[["top", "right", "left"]].set_visible(False)


def _what_one_sees(batches: Sequence[Batch]) -> str:
    failed = sum(batch.failed for batch in batches if batch.side == "unprotected")
    calls = sum(len(batch.calls) for batch in batches if batch.side == "unprotected")
    protected = [batch for batch in batches if batch.side == "protected"]
    title = f"With Peewee’s thread-local state {failed} of {calls} calls fail"
    if not protected:
        return title
    failed = sum(batch.failed for batch in protected)
    return f"{title}; with fastapi-peewee {failed or 'none'}"
