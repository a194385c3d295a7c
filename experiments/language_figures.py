"""Figures of language runs: tables of text, curves over a sweep."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distilljax.train import report


def text_table(
  names: Sequence[str],
  cells: Sequence[Sequence[str]],
  marks: Sequence[Sequence[bool | None]],
  *,
  title: str,
  caption: str,
) -> report.Figure:
  """Short texts in rows and columns; what is marked False stands out.

  Args:
    names: of the columns.
    cells: rows of texts.
    marks: rows of True (right), False (wrong) or None (neither).
    title: of the figure.
    caption: of the figure.

  Returns:
    A `Figure`; its data is the table itself, "x" behind what is wrong.
  """
  longest = [
    max(len(names[j]), *(len(row[j]) for row in cells)) + 2
    for j in range(len(names))
  ]
  edges = np.concatenate([[0], np.cumsum(longest)])

  def draw(figure, style):
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(-len(cells) - 0.5, 0.5)
    for j, name in enumerate(names):
      axes.text(edges[j], 0, name, color=style.muted, va="center", fontsize=9)
    for i, row in enumerate(cells):
      for j, text in enumerate(row):
        wrong = marks[i][j] is False
        axes.text(
          edges[j], -i - 1, text, va="center", family="DejaVu Sans Mono",
          fontsize=10, color=style.colours[1] if wrong else style.text,
        )

  columns = {}
  for j, name in enumerate(names):
    columns[name] = [
      f"{row[j]} x" if marks[i][j] is False else row[j]
      for i, row in enumerate(cells)
    ]
  return report.Figure(
    title, caption, draw, (10.4, 0.6 + 0.3 * len(cells)), columns
  )


def sweep(
  panels: Sequence[tuple[str, str]],
  scales: Sequence[float],
  rows: dict[str, np.ndarray],
  *,
  lines: Sequence[tuple[str, float]] = (),
  x_label: str,
  title: str,
  caption: str,
) -> report.Figure:
  """Metrics over a swept value: a point a repetition, a line through means.

  Args:
    panels: (metric, label of its axis), a panel each.
    scales: values of the sweep, s of them.
    rows: by metric [s, repetitions].
    lines: (name, position) of vertical lines.
    x_label: what is swept.
    title: of the figure.
    caption: of the figure.

  Returns:
    A `Figure`; its data has one line a value and repetition.
  """
  count = next(iter(rows.values())).shape[1]

  def draw(figure, style):
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (metric, label) in zip(grid.ravel(), panels):
      values = rows[metric]
      axes.plot(scales, values.mean(axis=1), color=style.colours[0])
      for j in range(count):
        axes.plot(
          scales, values[:, j], "o", color=style.colours[0], alpha=0.5,
          markersize=4,
        )
      for name, position in lines:
        axes.axvline(position, color=style.muted, linestyle=(0, (4, 3)))
        axes.annotate(
          name, (position, 1), xycoords=("data", "axes fraction"),
          color=style.muted, fontsize=8.5, ha="center", va="bottom",
        )
      axes.set_xlabel(x_label)
      axes.set_ylabel(label)
      axes.grid(True)

  data: dict[str, list[Any]] = {
    x_label: [s for s in scales for _ in range(count)],
    "repetition": [j for _ in scales for j in range(count)],
  }
  for metric, _ in panels:
    data[metric] = [float(v) for v in rows[metric].ravel()]
  return report.Figure(title, caption, draw, (10.4, 3.2), data)
