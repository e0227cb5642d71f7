"""The results as a picture: a column of panels for each database, a row for each workload."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .results import Report
from .stacks import CONTROL, DATABASES, OURS, WORKLOADS

# From Okabe and Ito's palette, told apart with any colour vision.
_OURS, _THEIRS, _CONTROL = "#D55E00", "#56B4E9", "#BBBBBB"


def draw(report: Report, path: Path) -> None:
    """Write the picture, as PNG."""
    databases, workloads = report.databases(), report.workloads()
    height = 0.9 + 0.24 * len(report.stacks())
    with plt.rc_context({"font.size": 9}):
        figure, grid = plt.subplots(
            len(workloads),
            len(databases),
            figsize=(0.6 + 5 * len(databases), 0.9 + height * len(workloads)),
            squeeze=False,
            layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12),
        )
        for row, workload in enumerate(workloads):
            for column, database in enumerate(databases):
                _draw_panel(grid[row, column], report, database, workload)
        figure.suptitle(
            "Requests a second; in brackets how many times as many sql_app answers",
            fontsize=12,
            fontweight="bold",
        )
        figure.savefig(path, format="png", dpi=110)
        plt.close(figure)


def _draw_panel(panel: Axes, report: Report, database: str, workload: str) -> None:
    found = [
        result
        for stack in reversed(report.stacks())
        if (result := report.find(database, stack, workload))
    ]
    colours = {OURS: _OURS, CONTROL: _CONTROL}
    panel.barh(
        [result.stack for result in found],
        [result.rate for result in found],
        color=[colours.get(result.stack, _THEIRS) for result in found],
        height=0.72,
    )
    for place, result in enumerate(found):
        ratio = report.ratio(result)
        label = f" {result.rate:,.0f}"
        if ratio is not None:
            label += f"  ({ratio:.1f}×)" if ratio >= 10 else f"  ({ratio:.2f}×)"
        elif result.stack not in (OURS, CONTROL):
            label += "  (no ratio)"
        weight = "bold" if result.stack == OURS else "normal"
        panel.text(result.rate, place, label, va="center", fontsize=8.5, fontweight=weight)
    longest = max((result.rate for result in found), default=1.0)
    panel.set_xlim(0, longest * 1.32)
    panel.set_title(f"{DATABASES[database]}: {WORKLOADS[workload].title}", fontsize=10, loc="left")
    panel.set_xticks([])
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
