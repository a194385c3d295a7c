"""The figures of a report, as data that knows how to draw itself.

A `Figure` holds what its CSV holds and a function that draws it on a matplotlib
figure in a given style. Nothing here imports matplotlib: the drawing is done by
`report.write_report`, twice (light and dark), in memory.
"""

import json
import math
import os
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distilljax import _checks

# Inches; the page shows 100 CSS pixels an inch.
WIDTH = 10.4
_MOST_POINTS = 1500
_MOST_PANELS = 24


class Style(NamedTuple):
  """Colours of one appearance; matplotlib's defaults are set from them too.

  Attributes:
    name: "light" or "dark".
    background: of the figure, equal to the page's card.
    text: of titles and labels.
    muted: of axes, floors, secondary text.
    grid: of grid lines and of the gaps between pictures.
    colours: of the series, in order; the first is the accent.
  """

  name: str
  background: str
  text: str
  muted: str
  grid: str
  colours: tuple[str, ...]


LIGHT = Style(
    "light",
    "#ffffff",
    "#1d2129",
    "#667085",
    "#e4e7ec",
    ("#2f5bd7", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#c2255c"),
)
DARK = Style(
    "dark",
    "#1a1d23",
    "#e7e9ee",
    "#9aa4b2",
    "#343a45",
    ("#82a8ff", "#ff9f5a", "#6fd08c", "#d79bf0", "#56c6d8", "#ff8fb0"),
)


class Figure(NamedTuple):
  """One figure of a report.

  Attributes:
    title: short; also names the CSV file.
    caption: what is seen and how it was made; also the text for readers who do
      not see the picture.
    draw: draw(matplotlib_figure, style) -> None; matplotlib's defaults already
      have the style's colours, and the layout is "constrained".
    size: (width, height) in inches; a width of 10.4 fills the page.
    data: columns of equal length, by name: the CSV beside the figure.
    vector: SVG (lines, bars) or PNG (pictures, many points).
  """

  title: str
  caption: str
  draw: Callable[[Any, Any], None]
  size: tuple[float, float]
  data: Mapping[str, Sequence[Any]]
  vector: bool = True


def _pixels(images: np.ndarray) -> np.ndarray:
  """[-1, 1] to RGB in [0, 1]; what is not finite becomes magenta."""
  bad = ~np.isfinite(images).all(axis=-1, keepdims=True)
  shown = np.clip(np.nan_to_num(images) * 0.5 + 0.5, 0.0, 1.0)
  if shown.shape[-1] == 1:
    shown = np.repeat(shown, 3, axis=-1)
  return np.where(bad, np.array([1.0, 0.0, 1.0]), shown[..., :3])


def image_grid(
    rows: Sequence[tuple[str, Any]],
    column_names: Sequence[str],
    *,
    title: str = "Samples by class",
    caption: str = (
        "One class a column; every model starts from the same latents in a"
        " column."
    ),
) -> Figure:
  """Pictures in rows (one a model) and columns (one a class).

  Args:
    rows: (label, images [c, h, w, ch] in [-1, 1]), ch 1 or 3; consecutive rows
      of one label are labelled once. Values outside are clipped, pixels that
      are not finite are shown in magenta.
    column_names: c names.
    title: of the figure.
    caption: of the figure.

  Returns:
    A `Figure`; its data has one line a picture: row, column, height, width,
    channels and the pixels as integers 0..255 separated by spaces.

  Raises:
    ValueError: no rows, or images that are not [c, h, w, ch] of one size with
      c names.
  """
  fn = "image_grid"
  if not rows:
    _checks.fail(fn, "rows", "at least one row", 0)
  columns = len(column_names)
  labels, pictures = [], []
  for label, images in rows:
    images = np.asarray(images, np.float32)
    _checks.rank(fn, f"images of {label!r}", images, 4, "[c, h, w, ch]")
    if len(images) != columns:
      _checks.fail(
          fn, f"images of {label!r}", f"{columns} like column_names",
          len(images)
      )
    if pictures and images.shape[1:] != pictures[0].shape[1:]:
      _checks.fail(
          fn,
          f"images of {label!r}",
          f"of size {list(pictures[0].shape[1:])} like the first row",
          list(images.shape[1:]),
      )
    if images.shape[-1] not in (1, 3):
      _checks.fail(
          fn, f"channels of {label!r}", "1 or 3", images.shape[-1]
      )
    labels.append(label)
    pictures.append(images)
  height, width, channels = pictures[0].shape[1:]
  cell = min(0.92, (WIDTH - 1.5) / columns)
  cell_height = cell * height / width

  def draw(figure, style):
    # One array, each pixel repeated, with gaps that show the background.
    zoom = max(1, 128 // width)
    gap = max(1, zoom * width // 16)
    step_y, step_x = height * zoom + gap, width * zoom + gap
    canvas = np.zeros((len(rows) * step_y - gap, columns * step_x - gap, 4))
    for i, images in enumerate(pictures):
      for j, picture in enumerate(_pixels(images)):
        big = picture.repeat(zoom, axis=0).repeat(zoom, axis=1)
        y, x = i * step_y, j * step_x
        canvas[y : y + height * zoom, x : x + width * zoom, :3] = big
        canvas[y : y + height * zoom, x : x + width * zoom, 3] = 1.0
    axes = figure.add_subplot()
    axes.imshow(canvas, interpolation="antialiased")
    axes.set_frame_on(False)
    axes.tick_params(length=0, labelsize=9.5)
    axes.xaxis.tick_top()
    most = max(6, int(cell * 11))
    names = [
        textwrap.fill(
            str(n), most, break_on_hyphens=False, break_long_words=False
        )
        for n in column_names
    ]
    centre_x = np.arange(columns) * step_x + (step_x - gap) / 2
    axes.set_xticks(centre_x, names, color=style.muted)
    ticks, texts, start = [], [], 0
    for i in range(1, len(labels) + 1):
      if i == len(labels) or labels[i] != labels[start]:
        middle = (start + i - 1) / 2
        ticks.append(middle * step_y + (step_y - gap) / 2)
        texts.append(textwrap.fill(labels[start], 14))
        start = i
    axes.set_yticks(ticks, texts, color=style.text)

  data = {
      "row": [label for label in labels for _ in range(columns)],
      "column": [str(n) for _ in labels for n in column_names],
      "height": [height] * (len(labels) * columns),
      "width": [width] * (len(labels) * columns),
      "channels": [channels] * (len(labels) * columns),
      "pixels": [
          " ".join(
              str(int(p)) if np.isfinite(p) else "nan"
              for p in np.round(np.clip(image * 0.5 + 0.5, 0, 1) * 255).ravel()
          )
          for images in pictures
          for image in images
      ],
  }
  size = (1.5 + cell * columns, 0.45 + len(rows) * cell_height * 1.02)
  return Figure(title, caption, draw, size, data, vector=False)


def scatter_grid(
    panels: Sequence[tuple[str, Any]],
    *,
    title: str = "Samples in the plane",
    caption: str = "All panels have the same axes and numbers of points.",
) -> Figure:
  """Point clouds side by side on one pair of axes.

  Args:
    panels: (label, points [n, 2]); points that are not finite are left out of
      the picture and counted in the panel's title.
    title: of the figure.
    caption: of the figure.

  Returns:
    A `Figure`; its data has one line a point: panel, x1, x2.

  Raises:
    ValueError: no panels, or points that are not [n, 2].
  """
  fn = "scatter_grid"
  if not panels:
    _checks.fail(fn, "panels", "at least one panel", 0)
  clouds = []
  for label, points in panels:
    points = np.asarray(points, np.float32)
    _checks.rank(fn, f"points of {label!r}", points, 2, "[n, 2]")
    if points.shape[1] != 2:
      _checks.fail(fn, f"points of {label!r}", "[n, 2]", list(points.shape))
    clouds.append((label, points))
  finite = [p[np.isfinite(p).all(axis=1)] for _, p in clouds]
  everything = np.concatenate(finite)
  if len(everything):
    low, high = np.percentile(everything, [0.2, 99.8], axis=0)
  else:
    low, high = -np.ones(2), np.ones(2)
  # A square window around all panels, so that shapes can be compared.
  centre = (low + high) / 2
  half = max(float((high - low).max()) / 2 * 1.15, 1e-3)
  columns = min(len(clouds), 4)
  lines = -(-len(clouds) // columns)

  def draw(figure, style):
    grid = figure.subplots(
        lines, columns, sharex=True, sharey=True, squeeze=False
    )
    for i, axes in enumerate(grid.ravel()):
      if i >= len(clouds):
        axes.set_visible(False)
        continue
      label, points = clouds[i]
      shown = finite[i]
      dots = max(0.8, min(9.0, 9000 / max(len(shown), 1)))
      colour = style.muted if i == 0 else style.colours[0]
      axes.scatter(
          shown[:, 0], shown[:, 1], s=dots, c=colour, alpha=0.6, linewidths=0
      )
      lost = len(points) - len(shown)
      axes.set_title(label + (f" ({lost} not finite)" if lost else ""))
      axes.set_xlim(centre[0] - half, centre[0] + half)
      axes.set_ylim(centre[1] - half, centre[1] + half)
      axes.set_aspect("equal")
      axes.grid(True)
      if i // columns == lines - 1 or i + columns >= len(clouds):
        axes.set_xlabel("$x_1$")
        axes.tick_params(labelbottom=True)
      if i % columns == 0:
        axes.set_ylabel("$x_2$")

  every = np.concatenate([p for _, p in clouds])
  data = {
      "panel": [label for label, points in clouds for _ in points],
      "x1": every[:, 0].tolist(),
      "x2": every[:, 1].tolist(),
  }
  side = WIDTH / max(columns, 2)
  size = (min(WIDTH, side * columns), lines * (side + 0.15) + 0.25)
  return Figure(title, caption, draw, size, data, vector=False)


# What the y axis says, by the last part of a metric's name.
_UNITS = {
    "samples_per_second": "samples / s",
    "steps_per_second": "steps / s",
    "tokens_per_second": "tokens / s",
    "grad_norm": "L2 norm",
    "gradient_norm": "L2 norm",
    "learning_rate": "per step",
    "loss": "loss",
    "skipped": "steps",
    "fcd": "FCD",
    "kl": "nats",
    "forward_kl": "nats",
    "reverse_kl": "nats",
}
_NOT_CURVES = {"stage", "step", "time", "seconds", "cpu_seconds"}


def read_metrics(
    path: str | os.PathLike,
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
  """Reads metrics.jsonl: {stage: {name: (steps [n], values [n])}}.

  Stages and names come in the order in which they appear. After a resume a step
  may have been written twice: the later line counts. A last line that was cut
  off is passed over.

  Args:
    path: the file; lines {"stage": ..., "step": ..., name: value, ...}.

  Returns:
    The series, sorted by step; {} if there is no such file.

  Raises:
    ValueError: a line other than the last that is not JSON, named by number.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return {}
  lines = path.read_text().splitlines()
  series: dict[str, dict[str, dict[int, float]]] = {}
  for number, line in enumerate(lines):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      if number == len(lines) - 1:
        break
      _checks.fail(
          "read_metrics", f"line {number + 1} of {path}", "JSON", line[:40]
      )
    stage = series.setdefault(str(row.get("stage", "run")), {})
    for name, value in row.items():
      if name in _NOT_CURVES or isinstance(value, (str, bool, list, dict)):
        continue
      number_value = math.nan if value is None else float(value)
      stage.setdefault(name, {})[int(row.get("step", 0))] = number_value
  return {
      stage: {
          name: (
              np.array(sorted(points)),
              np.array([points[step] for step in sorted(points)], np.float64),
          )
          for name, points in names.items()
      }
      for stage, names in series.items()
  }


def smooth(values: Any, *, width: int) -> np.ndarray:
  """Centred moving mean that ignores what is not finite.

  Near the ends the window is cut to what there is, evenly on both sides, so
  that a slope stays a slope.

  Args:
    values: a series. Shape [n].
    width: number of values in the window, made odd.

  Returns:
    Float64 [n]; NaN where the whole window is not finite.
  """
  values = np.asarray(values, np.float64)
  if not len(values):
    return values
  ok = np.isfinite(values)
  clean = np.where(ok, values, 0.0)
  half = min(width // 2, max(len(values) - 1, 0) // 2)
  window = np.ones(2 * half + 1)
  # Not by a running sum: one huge value would cost all later ones their digits.
  total = np.convolve(clean, window, mode="same")
  count = np.convolve(ok.astype(np.float64), window, mode="same")
  for i in range(half):
    ends = ((i, slice(0, 2 * i + 1)), (-1 - i, slice(-1 - 2 * i, None)))
    for j, piece in ends:
      total[j], count[j] = clean[piece].sum(), ok[piece].sum()
  return np.where(count > 0.5, total / np.maximum(count, 1.0), np.nan)


def _is_log(values: np.ndarray) -> bool:
  """Worth a log axis: positive throughout and over more than 1.5 decades."""
  values = values[np.isfinite(values)]
  if not len(values) or values.min() <= 0:
    return False
  return bool(values.max() / values.min() > 30)


def _limits(values: np.ndarray) -> tuple[float, float] | None:
  """Axis limits for a series that hardly varies, whose noise is no news."""
  values = values[np.isfinite(values)]
  if not len(values):
    return None
  size = max(abs(values.max()), abs(values.min()))
  if values.max() - values.min() > 1e-6 * size:
    return None
  return (-1.0, 1.0) if size == 0 else (
      values.min() - 0.5 * size, values.max() + 0.5 * size
  )


def _order(name: str) -> tuple[int, str, str]:
  network, _, rest = name.rpartition("/")
  last = {"samples_per_second": 3, "steps_per_second": 3}.get(rest, 1)
  if rest in ("grad_norm", "gradient_norm", "learning_rate", "skipped"):
    last = 2
  return (last, "" if network == "student" else network, rest)


def curves(metrics_path: str | os.PathLike) -> list[Figure]:
  """Training curves, one figure a stage and one panel a metric.

  The raw values are drawn faintly behind a moving mean; an axis is logarithmic
  where the values are positive and span more than a factor of 30. Panels of one
  network share a colour.

  Args:
    metrics_path: a metrics.jsonl, see `read_metrics`.

  Returns:
    The figures, in the order of the stages; [] for a missing or empty file.
    Their data has one line a value: step, metric, value, smoothed.
  """
  figures = []
  for stage, names in read_metrics(metrics_path).items():
    ordered = sorted(names, key=_order)
    for start in range(0, len(ordered), _MOST_PANELS):
      part = {n: names[n] for n in ordered[start : start + _MOST_PANELS]}
      more = "" if start == 0 else f", part {start // _MOST_PANELS + 1}"
      figures.append(_curve_figure(stage, part, more))
  return figures


def _curve_figure(stage, series, more) -> Figure:
  networks = dict.fromkeys(n.rpartition("/")[0] for n in series)
  named = [network for network in networks if network]
  smoothed = {
      name: smooth(values, width=min(201, max(1, len(values) // 20)))
      for name, (_, values) in series.items()
  }
  columns = min(3, max(len(series), 1))
  lines = -(-len(series) // columns)

  def draw(figure, style):
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.ravel()[len(series) :]:
      axes.set_visible(False)
    for axes, (name, (steps, values)) in zip(grid.ravel(), series.items()):
      network, _, last = name.rpartition("/")
      colour = style.muted
      if network:
        colour = style.colours[named.index(network) % len(style.colours)]
      stride = max(1, len(steps) // _MOST_POINTS)
      shown = slice(None, None, stride)
      axes.plot(
          steps[shown], values[shown], color=colour, alpha=0.3, linewidth=0.9
      )
      axes.plot(
          steps[shown], smoothed[name][shown], color=colour, linewidth=1.8
      )
      if len(steps) == 1:
        axes.plot(steps, values, "o", color=colour)
      if last != "learning_rate" and _is_log(values):
        axes.set_yscale("log")
      limits = _limits(values)
      if limits:
        axes.set_ylim(*limits)
      axes.set_title(name, loc="left")
      axes.set_xlabel("step")
      axes.set_ylabel(_UNITS.get(last, last.replace("_", " ")))
      axes.margins(x=0.02)
      axes.grid(True)

  data: dict[str, list[Any]] = {
      "step": [], "metric": [], "value": [], "smoothed": []
  }
  for name, (steps, values) in series.items():
    data["step"] += steps.tolist()
    data["metric"] += [name] * len(steps)
    data["value"] += values.tolist()
    data["smoothed"] += smoothed[name].tolist()
  caption = (
      f"Stage “{stage}”: every metric against the training step. Faint: as"
      " written; solid: moving mean. Logarithmic where a metric is positive and"
      " spans more than a factor of 30."
  )
  width = WIDTH if columns == 3 else WIDTH * (0.36 * columns)
  size = (width, 0.2 + 2.3 * lines)
  return Figure(f"Training: {stage}{more}", caption, draw, size, data)


def row_name(row: Mapping[str, Any]) -> str:
  """"student, 1 step", or the model alone where there are no steps."""
  steps = row.get("steps")
  if steps is None:
    return str(row["model"])
  return f"{row['model']}, {steps} step{'' if steps == 1 else 's'}"


def score_chart(
    scores: Sequence[Mapping[str, Any]],
    floors: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    label: str | None = None,
    higher_is_better: bool = False,
) -> Figure | None:
  """One metric of every model on one axis, floors as vertical lines.

  Args:
    scores: rows {model, steps, metric, value, n}.
    floors: rows of the same shape, with steps None.
    metric: which of them to draw.
    label: of the axis; None means the metric's name.
    higher_is_better: said on the axis.

  Returns:
    A `Figure` (data: model, steps, kind, value, n), or None where no row has a
    finite value of this metric.
  """
  def pick(rows):
    return [
        r
        for r in rows
        if r["metric"] == metric
        and r["value"] is not None
        and math.isfinite(r["value"])
    ]

  models, lines = pick(scores), pick(floors)
  if not models:
    return None
  label = label or metric
  values = [r["value"] for r in models + lines]
  log = _is_log(np.array(values))
  kinds = list(dict.fromkeys(r["model"] for r in models))

  def draw(figure, style):
    axes = figure.add_subplot()
    where = np.arange(len(models))[::-1]
    if log:
      axes.set_xscale("log")
      axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    left = min(values) / 1.25 if log else min(0.0, *values)
    right = max(values) * 1.6 if log else max(values) * 1.12
    colours = dict(zip(kinds[::-1], style.colours))
    for y, row in zip(where, models):
      colour = colours.get(row["model"], style.muted)
      axes.plot(
          [left, row["value"]], [y, y], color=colour, alpha=0.45, linewidth=2
      )
      axes.plot([row["value"]], [y], "o", color=colour, markersize=9)
      axes.annotate(
          f"{row['value']:.3g}", (row["value"], y), xytext=(9, 0),
          textcoords="offset points", va="center", color=style.text,
          fontsize=10,
          bbox={"facecolor": style.background, "edgecolor": "none", "pad": 1},
      )
    top = len(models) - 0.35
    for row in lines:
      axes.axvline(
          row["value"], color=style.muted, linestyle=(0, (4, 3)), linewidth=1.1
      )
      axes.annotate(
          textwrap.fill(row["model"].removeprefix("floor: "), 14)
          + f"\n{row['value']:.3g}",
          (row["value"], top), xytext=(0, 3), textcoords="offset points",
          ha="center", va="bottom", color=style.muted, fontsize=8.5,
      )
    axes.set_xlim(left, right)
    axes.set_ylim(-0.6, top)
    names = [row_name(r) for r in models]
    axes.set_yticks(where, names, color=style.text)
    good = "higher is better" if higher_is_better else "lower is better"
    scale = ", log scale" if log else ""
    axes.set_xlabel(f"{label} ({good}{scale})")
    axes.tick_params(axis="y", length=0, labelsize=10.5)
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")

  kinds_of_rows = ["model"] * len(models) + ["floor"] * len(lines)
  data = {
      "model": [r["model"] for r in models + lines],
      "steps": [r.get("steps") for r in models + lines],
      "kind": kinds_of_rows,
      "value": values,
      "n": [r.get("n") for r in models + lines],
  }
  caption = (
      f"{label} of the final weights. Dashed: what is known to be as good as"
      " the sample size allows, and what is known to be bad."
  )
  size = (WIDTH, 1.35 + 0.42 * len(models))
  return Figure(f"{label} at a glance", caption, draw, size, data)


__all__ = [
    "DARK",
    "LIGHT",
    "Figure",
    "Style",
    "curves",
    "image_grid",
    "read_metrics",
    "row_name",
    "scatter_grid",
    "score_chart",
    "smooth",
]
