"""One self-contained page that says what a run did, and the data behind it.

`write_report` turns a run's `summary` and a list of `Figure`s into
`workdir/report.html`, with one CSV beside each figure and table in
`workdir/report/`. The page holds its pictures (each drawn twice, for light and
for dark) and its data, asks the network for nothing, and is written to a
temporary file and renamed, so a reader never meets half of it.

matplotlib is imported inside the functions and draws in memory.
"""

import base64
import csv
import datetime
import html
import io
import logging
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from distilljax import _checks
from distilljax.evals import image
from distilljax.train import report_template
from distilljax.train.report_figures import (
    DARK,
    LIGHT,
    Figure,
    Style,
    curves,
    image_grid,
    read_metrics,
    row_name,
    scatter_grid,
    score_chart,
)

_LOG = logging.getLogger(__name__)
_DPI = 200


# The scores of problems in the plane; those of images are in `evals`.
_PLANE = {
    "sliced_wasserstein": image.MetricInfo(
        "SW₂",
        False,
        "sliced Wasserstein-2 distance between samples and true samples.",
    ),
    "energy_distance": image.MetricInfo(
        "energy distance",
        False,
        "unbiased energy distance to true samples: about 0, even slightly"
        " negative, for equal distributions.",
    ),
    "mode_tv": image.MetricInfo(
        "mode TV",
        False,
        "total variation between the shares of samples at each mode and the"
        " true weights.",
    ),
    "modes": image.MetricInfo(
        "modes", True, "number of modes that samples reach."
    ),
    "within_4sd": image.MetricInfo(
        "within 4 sd",
        True,
        "share of samples within four standard deviations of a mode.",
        share=True,
    ),
    "map_rmse": image.MetricInfo(
        "map RMSE",
        False,
        "root mean square distance to the exact end point from the same"
        " latent.",
    ),
}
# The scores of language models on tasks with a right answer.
_LANGUAGE = {
    "answer": image.MetricInfo(
        "answer",
        True,
        "mean reward of completions sampled at temperature 1; for chains and"
        " sums the share whose final answer is right.",
        share=True,
    ),
    "trace": image.MetricInfo(
        "trace",
        True,
        "share of sampled completions that are right in every step.",
        share=True,
    ),
    "answer_greedy": image.MetricInfo(
        "answer, greedy", True, "the same of greedy completions.", share=True
    ),
    "trace_greedy": image.MetricInfo(
        "trace, greedy", True, "the same of greedy completions.", share=True
    ),
    "parsed": image.MetricInfo(
        "parse rate",
        True,
        "share of sampled completions that keep the format.",
        share=True,
    ),
    "content": image.MetricInfo(
        "content",
        True,
        "mean reward of the sampled completions that keep the format.",
        share=True,
    ),
    "off_modal": image.MetricInfo(
        "off-modal mass",
        False,
        "probability beside the token that the format wants, at the structural"
        " position where it is largest.",
    ),
    "reverse_kl": image.MetricInfo(
        "reverse KL",
        False,
        "KL(model||teacher) at temperature 1, nats a sequence, on the model's"
        " own samples (exact for the Markov model).",
    ),
    "forward_kl": image.MetricInfo(
        "forward KL",
        False,
        "KL(teacher||model) at temperature 1, nats a sequence, on the teacher's"
        " samples.",
    ),
    "target_kl": image.MetricInfo(
        "KL to the optimum",
        False,
        "exact KL(model||optimum of its own objective), nats a sequence.",
    ),
    "return": image.MetricInfo(
        "return", True, "exact expected reward of a sequence."
    ),
}
_METRICS = {**image.METRICS, **_PLANE, **_LANGUAGE}


def metric_label(metric: str) -> str:
  """What a column or an axis calls a metric; its name where it is unknown.

  Args:
    metric: name of a metric, as in summary.json.

  Returns:
    The label.
  """
  return _METRICS[metric].label if metric in _METRICS else metric


def higher_is_better(metric: str) -> bool:
  """The direction of a metric.

  Args:
    metric: name of a metric with a direction, as in summary.json.
  """
  return _METRICS[metric].higher_is_better


class _Page(NamedTuple):
  """What the sections write to: the folder of the CSVs and their names."""

  folder: pathlib.Path
  names: dict[str, int]


def write_atomically(path: str | os.PathLike, content: bytes) -> pathlib.Path:
  """Writes a file so that a reader sees the old one or the new one, whole.

  Args:
    path: the file; its folder is made if it is missing.
    content: its bytes.

  Returns:
    The path.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(content)
    # mkstemp makes files that only the owner may read.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise
  return path


# --- Numbers and text ---------------------------------------------------------


def _text(value: Any) -> str:
  return html.escape(str(value))


def _number(value: Any) -> str:
  """Three significant digits in HTML; what is missing is a dash."""
  if value is None:
    return "–"
  if not math.isfinite(value):
    return str(float(value)).replace("nan", "NaN").replace("inf", "∞")
  if value == 0:
    return "0"
  size = math.floor(math.log10(abs(value)))
  if -3 <= size < 6:
    shown = f"{value:,.{max(0, 2 - size)}f}"
  else:
    mantissa, power = f"{value:.2e}".split("e")
    sign = "−" if power.startswith("-") else ""
    shown = f"{mantissa}·10<sup>{sign}{int(power[1:])}</sup>"
  return shown.replace("-", "−")


def _finite(value: Any) -> bool:
  return value is not None and math.isfinite(value)


def _decimals(models: Sequence[Any], floors: Sequence[Any]) -> int | None:
  """Decimals that suit a whole column, or None for single formats.

  Enough for three digits of the smallest model value and two of the smallest
  floor.
  """
  finite = [v for v in (*models, *floors) if _finite(v)]
  if all(float(v).is_integer() for v in finite):
    return 0
  needed = [
      digits - 1 - math.floor(math.log10(abs(value)))
      for values, digits in ((models, 3), (floors, 2))
      for value in values
      if _finite(value) and value
  ]
  most = max(needed, default=2)
  return max(0, most) if most <= 6 else None


def _column_number(value: Any, decimals: int | None) -> str:
  if decimals is None or not _finite(value):
    return _number(value)
  return f"{value:,.{decimals}f}".replace("-", "−")


def _seconds(value: Any) -> str:
  if value is None:
    return "–"
  if not math.isfinite(value):
    return _number(value)
  if value >= 3600:
    return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"
  if value >= 120:
    return f"{int(value // 60)} min {int(value % 60)} s"
  return f"{value:.1f} s"


def _csv(data: Mapping[str, Sequence[Any]]) -> bytes:
  """Columns as a CSV; floats with 7 digits, what is missing empty."""
  lengths = {name: len(column) for name, column in data.items()}
  if len(set(lengths.values())) > 1:
    _checks.fail("write_report", "data", "columns of equal length", lengths)

  def cell(value):
    if value is None:
      return ""
    if isinstance(value, float) or type(value).__name__.startswith("float"):
      return f"{float(value):.7g}"
    return value

  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(data)
  writer.writerows(zip(*([cell(v) for v in c] for c in data.values())))
  return buffer.getvalue().encode()


def _slug(title: str) -> str:
  return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_") or "figure"


def _data_link(page: _Page, title: str, data: Mapping[str, Any]) -> str:
  """Writes the CSV and links to the copy that the page itself holds."""
  slug = _slug(title)
  page.names[slug] = page.names.get(slug, 0) + 1
  if page.names[slug] > 1:
    slug = f"{slug}_{page.names[slug]}"
  content = _csv(data)
  write_atomically(page.folder / f"{slug}.csv", content)
  encoded = base64.b64encode(content).decode()
  return (
      f'<a download="{slug}.csv" href="data:text/csv;base64,{encoded}">'
      f"Data: report/{slug}.csv</a>"
  )


# --- Figures ------------------------------------------------------------------


def _rc(style: Style) -> dict[str, Any]:
  """matplotlib's defaults in the colours of a style."""
  from cycler import cycler  # noqa: PLC0415

  return {
      "axes.axisbelow": True,
      "axes.edgecolor": style.grid,
      "axes.facecolor": style.background,
      "axes.labelcolor": style.text,
      "axes.labelsize": 9.5,
      "axes.prop_cycle": cycler(color=style.colours),
      "axes.spines.right": False,
      "axes.spines.top": False,
      "axes.titlecolor": style.text,
      "axes.titlesize": 10.5,
      "axes.unicode_minus": True,
      "figure.constrained_layout.use": True,
      "figure.edgecolor": style.background,
      "figure.facecolor": style.background,
      "font.family": "DejaVu Sans",
      "font.size": 10,
      "grid.color": style.grid,
      "grid.linewidth": 0.7,
      "legend.edgecolor": style.grid,
      "legend.facecolor": style.background,
      "legend.labelcolor": style.text,
      "savefig.facecolor": style.background,
      "svg.fonttype": "path",
      "svg.hashsalt": "distilljax",
      "text.color": style.text,
      "xtick.color": style.muted,
      "xtick.labelsize": 9,
      "ytick.color": style.muted,
      "ytick.labelsize": 9,
  }


def render(figure: Figure, style: Style) -> bytes:
  """Draws a figure in memory.

  Args:
    figure: what to draw.
    style: `LIGHT` or `DARK`.

  Returns:
    The bytes of an SVG, or of a PNG where `figure.vector` is false; the same
    figure and style give the same bytes.
  """
  import matplotlib  # noqa: PLC0415
  from matplotlib import figure as mpl_figure  # noqa: PLC0415
  from matplotlib.backends import backend_agg  # noqa: PLC0415

  buffer = io.BytesIO()
  with matplotlib.rc_context(_rc(style)):
    canvas = mpl_figure.Figure(figsize=figure.size, layout="constrained")
    backend_agg.FigureCanvasAgg(canvas)
    figure.draw(canvas, style)
    if figure.vector:
      nothing = {"Date": None, "Creator": None}
      canvas.savefig(buffer, format="svg", metadata=nothing)
    else:
      canvas.savefig(
          buffer, format="png", dpi=_DPI, metadata={"Software": None}
      )
  return buffer.getvalue()


def _figure(page: _Page, figure: Figure) -> str:
  kind = "svg+xml" if figure.vector else "png"
  link = _data_link(page, figure.title, figure.data)
  try:
    pictures = [
        f"data:image/{kind};base64,"
        + base64.b64encode(render(figure, style)).decode()
        for style in (LIGHT, DARK)
    ]
  except Exception as e:  # pylint: disable=broad-exception-caught
    # A picture must not cost the report of hours of training.
    reason = (str(e).splitlines() or [repr(e)])[0]
    _LOG.warning("figure %r could not be drawn: %s", figure.title, reason)
    picture = (
        f'<p class="failed">This figure could not be drawn: {_text(reason)}</p>'
    )
  else:
    width, height = (round(100 * inches) for inches in figure.size)
    alt = _text(f"{figure.title}. {figure.caption}")
    picture = (
        '<picture><source media="(prefers-color-scheme: dark)"'
        f' srcset="{pictures[1]}"><img src="{pictures[0]}" width="{width}"'
        f' height="{height}" alt="{alt}"></picture>'
    )
  return (
      f'<figure class="card"><h3>{_text(figure.title)}</h3>{picture}'
      f"<figcaption>{_text(figure.caption)} {link}</figcaption></figure>"
  )


# --- Tables -------------------------------------------------------------------


def _head(*names: str, left: Sequence[str] = ()) -> str:
  """A header row of plain names; those in `left` are aligned to the left."""
  return "".join(
      f'<th scope="col"{" class=left" if n in left else ""}>{_text(n)}</th>'
      for n in names
  )


def _table(head: str, bodies: Iterable[tuple[str, list[str]]]) -> str:
  """`head` is cells, `bodies` (class, rows); all of it is HTML already."""
  parts = [f'<div class="scroll"><table><thead><tr>{head}</tr></thead>']
  for name, rows in bodies:
    if rows:
      mark = f' class="{name}"' if name else ""
      parts.append(f"<tbody{mark}>{''.join(rows)}</tbody>")
  return "".join(parts) + "</table></div>"


def _best(rows, info) -> dict[str, float]:
  """The best finite value of each metric whose direction is known."""
  best: dict[str, float] = {}
  for row in rows:
    metric, value = row["metric"], row["value"]
    if metric not in info or not _finite(value):
      continue
    choose = max if info[metric].higher_is_better else min
    best[metric] = choose(best.get(metric, value), value)
  return best


def _score_table(page: _Page, summary: Mapping[str, Any]) -> str:
  scores = list(summary.get("scores") or [])
  floors = list(summary.get("floors") or [])
  info = _METRICS
  rows = list(scores) + list(floors)
  metrics = list(dict.fromkeys(r["metric"] for r in rows))
  best = _best(scores, info)
  head = _head("model", "n")
  for metric in metrics:
    known = info.get(metric)
    arrow = ""
    if known:
      good = "higher" if known.higher_is_better else "lower"
      arrow = " ↑" if known.higher_is_better else " ↓"
      arrow = f'<span title="{good} is better">{arrow}</span>'
    name = known.label if known else metric
    head += f'<th scope="col">{_text(name)}{arrow}</th>'

  def column(part, metric):
    return [r["value"] for r in part if r["metric"] == metric]

  decimals = {
      m: 3
      if m in info and info[m].share
      else _decimals(column(scores, m), column(floors, m))
      for m in metrics
  }

  def body(part, marked):
    lines: dict[tuple, dict[str, Any]] = {}
    for row in part:
      key = (row["model"], row.get("steps"))
      lines.setdefault(key, {})[row["metric"]] = row
    out = []
    for cells in lines.values():
      first = next(iter(cells.values()))
      counts = sorted({int(r["n"]) for r in cells.values() if r.get("n")})
      n = ", ".join(f"{c:,}" for c in counts) or "–"
      line = [f"<td>{_text(row_name(first))}</td><td>{n}</td>"]
      for metric in metrics:
        value = cells.get(metric, {}).get("value")
        mark = ""
        if metric in cells and not _finite(value):
          mark = ' class="broken"'
        elif marked and value is not None and value == best.get(metric):
          mark = ' class="best"'
        shown = _column_number(value, decimals[metric])
        spread = cells.get(metric, {}).get("spread")
        if spread is not None:
          shown += f" ± {_column_number(spread, decimals[metric])}"
        line.append(f"<td{mark}>{shown}</td>")
      out.append(f"<tr>{''.join(line)}</tr>")
    return out

  table = _table(
      head, [("", body(scores, True)), ("floors", body(floors, False))]
  )
  columns = ("model", "steps", "metric", "value", "n")
  link = _data_link(
      page, "scores", {c: [r.get(c) for r in rows] for c in columns}
  )
  if summary.get("classifier_accuracy") is not None:
    judge = (
        " The classifier is right on"
        f" {100 * summary['classifier_accuracy']:.1f} % of the held-out images."
    )
  else:
    judge = ""
  meanings = "".join(
      f"<dt>{_text(info[m].label)}</dt><dd>{_text(info[m].meaning)}</dd>"
      for m in metrics
      if m in info
  )
  if meanings:
    meanings = f'<dl class="metrics">{meanings}</dl>'
  return (
      f'<div class="card">{table}<p class="note" style="margin-top:12px">Final'
      " weights; one row a model and number of sampling steps; the best of a"
      " column is marked. Floors (grey) are sets whose worth is known: read"
      f" every score against them.{judge} {link}</p>{meanings}</div>"
  )


def _timing_table(page: _Page, summary: Mapping[str, Any]) -> str:
  wall = dict(summary.get("seconds") or {})
  cpu = dict(summary.get("cpu_seconds") or {})
  compiling = summary.get("compile_seconds")
  stages = list(dict.fromkeys([*wall, *cpu]))
  each = compiling if isinstance(compiling, Mapping) else {}
  stages += [s for s in each if s not in stages]
  head = _head("stage", "wall time", "CPU time")
  if each:
    head += _head("of it compiling")

  def line(name, values, mark=""):
    shown = ["–" if v is None else f"{v:,.1f} s" for v in values]
    cells = "".join(f"<td>{v}</td>" for v in shown)
    return f"<tr{mark}><td>{_text(name)}</td>{cells}</tr>"

  def total(part):
    values = [v for v in part.values() if v is not None]
    return sum(values) if values else None

  columns = [wall, cpu] + ([each] if each else [])
  rows = [line(s, [c.get(s) for c in columns]) for s in stages]
  rows.append(
      line("total", [total(c) for c in columns], mark=' class="total"')
  )
  memory = summary.get("peak_memory_bytes") or {}
  if memory:
    shown = ", ".join(f"{k} {v / 2**20:,.0f} MiB" for k, v in memory.items())
    rows.append(
        f'<tr><td>peak memory of training</td><td colspan="{len(columns)}">'
        f"{_text(shown)}</td></tr>"
    )
  note = ""
  if compiling is not None and not each:
    note = f"Compilation took {_seconds(compiling)} of it. "
  data = {
      "stage": stages,
      "seconds": [wall.get(s) for s in stages],
      "cpu_seconds": [cpu.get(s) for s in stages],
  }
  if each:
    data["compile_seconds"] = [each.get(s) for s in stages]
  link = _data_link(page, "timing", data)
  return (
      f'<div class="card">{_table(head, [("", rows)])}<p class="note"'
      f' style="margin-top:12px">{note}CPU time counts all cores. {link}</p>'
      "</div>"
  )


def _guard(summary: Mapping[str, Any]) -> str:
  skipped = summary.get("skipped") or {}
  if not isinstance(skipped, Mapping):
    skipped = {"all networks": skipped}
  hints = summary.get("hints") or []
  parts = [f'<p class="hint">{_text(hint)}</p>' for hint in hints]
  if any(skipped.values()):
    rows = [
        f"<tr><td>{_text(name)}</td>"
        f'<td{" class=broken" if count else ""}>{int(count):,}</td></tr>'
        for name, count in skipped.items()
    ]
    head = _head("stage / network", "skipped steps")
    parts.append(_table(head, [("", rows)]))
    parts.append(
        '<p class="note" style="margin-top:12px">A step whose gradient is not'
        " finite leaves that network, its optimiser and its EMA as they were."
        "</p>"
    )
  elif skipped:
    names = ", ".join(_text(name) for name in skipped)
    parts.append(
        f"<p>No step was skipped: every gradient was finite ({names}).</p>"
    )
  else:
    parts.append("<p>No skipped steps were recorded.</p>")
  if not hints:
    parts.append('<p class="note">The diagnostics have no hints.</p>')
  return f'<div class="card">{"".join(parts)}</div>'


def _flat(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
  if isinstance(config, Mapping) and config:
    return [
        pair
        for name, value in config.items()
        for pair in _flat(value, f"{prefix}.{name}" if prefix else str(name))
    ]
  return [(prefix, config)]


def _reproduce(page: _Page, summary: Mapping[str, Any], command: str) -> str:
  facts = []
  if summary.get("seed") is not None:
    facts.append(("seed", f"<code>{_text(summary['seed'])}</code>"))
  if summary.get("params_sha256"):
    facts.append((
        "SHA-256 of the final student's parameters",
        f"<code>{_text(summary['params_sha256'])}</code>",
    ))
  for name, count in dict(summary.get("parameters") or {}).items():
    facts.append((f"parameters of {_text(name)}", f"{int(count):,}"))
  for name, version in dict(summary.get("versions") or {}).items():
    facts.append((_text(name), f"<code>{_text(version)}</code>"))
  rows = [
      f'<tr><td>{name}</td><td class="wrap">{value}</td></tr>'
      for name, value in facts
  ]
  parts = [f"<pre><code>{_text(command)}</code></pre>"]
  if rows:
    head = _head("what", "value", left=["value"])
    parts.append(_table(head, [("", rows)]))
  config = _flat(dict(summary.get("config") or {}))
  if config and config != [("", {})]:
    link = _data_link(
        page,
        "config",
        {"field": [k for k, _ in config], "value": [str(v) for _, v in config]},
    )
    rows = [
        f"<tr><td><code>{_text(name)}</code></td>"
        f'<td class="wrap"><code>{_text(value)}</code></td></tr>'
        for name, value in config
    ]
    head = _head("field", "value", left=["value"])
    parts.append(
        f"<details><summary>Configuration, {len(config)} fields</summary>"
        f'{_table(head, [("", rows)])}<p class="note">{link}</p></details>'
    )
  return f'<div class="card">{"".join(parts)}</div>'


# --- The page -----------------------------------------------------------------


def _tiles(summary: Mapping[str, Any]) -> str:
  """The first metric of a few models, its noise floor, and the time it took."""
  info = _METRICS
  scores = list(summary.get("scores") or [])
  tiles = []
  if scores:
    metric = scores[0]["metric"]
    label = info[metric].label if metric in info else metric
    rows = [r for r in scores if r["metric"] == metric]
    models = [r["model"] for r in rows]
    fewest = min(
        (r for r in rows if r["model"] == models[-1]),
        key=lambda r: r.get("steps") or 0,
    )
    for row in rows[:4]:
      tiles.append((
          "tile main" if row is fewest else "tile",
          _number(row["value"]),
          f"{label}: {row_name(row)}",
      ))
    floor = [r for r in summary.get("floors") or [] if r["metric"] == metric]
    for row in floor[:1]:
      name = row["model"].removeprefix("floor: ")
      tiles.append((
          "tile", _number(row["value"]), f"{label}: floor ({name})"
      ))
  wall = [v for v in (summary.get("seconds") or {}).values() if v is not None]
  if wall:
    tiles.append(("tile", _seconds(sum(wall)), "wall time in all"))
  if not tiles:
    return ""
  body = "".join(
      f'<div class="{mark}"><b>{value}</b><span>{_text(label)}</span></div>'
      for mark, value, label in tiles
  )
  return f'<div class="tiles">{body}</div>'


def write_report(
    workdir: str | os.PathLike,
    *,
    title: str,
    lead: str,
    summary: Mapping[str, Any],
    figures: Sequence[Figure],
    command: str,
) -> pathlib.Path:
  """Writes `workdir/report.html` and the CSVs in `workdir/report/`.

  The page holds, in this order: title, lead and headline numbers; the figures
  that are not curves, as given; the scores as a chart and a table with floors;
  the training curves (titles that begin with "Training"); times and memory;
  skipped steps and hints; how to reproduce. A section with nothing to show is
  left out.

  Args:
    workdir: the run's folder.
    title: of the page, plain text.
    lead: one paragraph of plain text: what was trained, on what, how long, and
      what was reached.
    summary: the dict of summary.json. Read are `scores` and `floors` (rows
      {model, steps, metric, value, n}, and `spread` where a value is the mean
      of several runs), `seconds` and `cpu_seconds` (by stage),
      `compile_seconds` (a number, or by stage), `peak_memory_bytes` (by where
      it is: host, device), `params_sha256`, `versions`,
      `seed`, `skipped` (by network), `config`, `classifier_accuracy`,
      `parameters` (by network), and `hints` (sentences of the diagnostics);
      every one of them may be missing.
    figures: from `image_grid`, `scatter_grid`, `curves`, or made by hand. One
      whose drawing fails is replaced by a line that says so.
    command: how to run this again.

  Returns:
    The path of report.html.

  Raises:
    ValueError: a figure whose data columns differ in length.
    OSError: the folder cannot be written; an older report is then intact.
  """
  workdir = pathlib.Path(workdir)
  page = _Page(workdir / "report", {})
  scores = list(summary.get("scores") or [])
  floors = list(summary.get("floors") or [])
  is_curve = lambda f: f.title.startswith("Training")
  sections: list[tuple[str, str]] = []

  pictures = [_figure(page, f) for f in figures if not is_curve(f)]
  if pictures:
    sections.append(("Samples", "".join(pictures)))
  if scores or floors:
    info = _METRICS
    chart = None
    if scores:
      metric = scores[0]["metric"]
      known = info.get(metric)
      chart = score_chart(
          scores,
          floors,
          metric=metric,
          label=known.label if known else metric,
          higher_is_better=bool(known and known.higher_is_better),
      )
    drawn = _figure(page, chart) if chart else ""
    sections.append(("Scores", drawn + _score_table(page, summary)))
  training = [_figure(page, f) for f in figures if is_curve(f)]
  if training:
    sections.append(("Training", "".join(training)))
  if summary.get("seconds") or summary.get("cpu_seconds"):
    sections.append(("Cost", _timing_table(page, summary)))
  sections.append(("Guard and diagnostics", _guard(summary)))
  sections.append(("How to reproduce", _reproduce(page, summary, command)))

  body = "\n".join(
      f'<section id="{_slug(name)}"><h2>{_text(name)}</h2>{content}</section>'
      for name, content in sections
  )
  links = "".join(
      f'<a href="#{_slug(name)}">{_text(name)}</a>' for name, _ in sections
  )
  today = datetime.date.today().isoformat()
  content = report_template.PAGE.substitute(
      title=_text(title),
      lead=_text(lead),
      style=report_template.STYLE,
      tiles=_tiles(summary),
      links=links,
      sections=body,
      footer=(
          f"Written by distilljax on {today}. This page needs no network; the"
          " data behind every figure is inside it and in report/ beside it."
      ),
  )
  return write_atomically(workdir / "report.html", content.encode())


__all__ = [
    "DARK",
    "LIGHT",
    "Figure",
    "Style",
    "curves",
    "image_grid",
    "metric_label",
    "read_metrics",
    "render",
    "scatter_grid",
    "score_chart",
    "write_atomically",
    "write_report",
]
