"""The report: what is on the page, beside it, and what it never does."""

import base64
import csv
import html.parser
import io
import json
import logging
import os
import re

import numpy as np
import pytest

from distilljax.train import report, report_figures
from tests import helpers

_METRICS = ("fcd", "mmd", "precision")


def _rows(model, steps, values, n=2000):
  return [
    {"model": model, "steps": steps, "metric": m, "value": v, "n": n}
    for m, v in zip(_METRICS, values)
  ]


SUMMARY = {
  "scores": [
    *_rows("teacher", 20, [4.13, 0.00093, 0.861]),
    *_rows("teacher", 1, [33.1, 0.0142, 0.981]),
    *_rows("student", 1, [5.28, -0.00121, 0.872]),
  ],
  "floors": [
    *_rows("floor: test vs train", None, [0.455, 1e-5, 0.863], n=397),
    *_rows("floor: <noise>", None, [125.5, 0.1175, 0.228]),
  ],
  "seconds": {"teacher": 92.4, "dmd2": 104.94},
  "cpu_seconds": {"teacher": 118.0, "dmd2": 141.3},
  "compile_seconds": {"teacher": 6.5},
  "peak_memory_bytes": {"host": 3 * 2**30, "device": 2**20},
  "params_sha256": "9f86d081" * 8,
  "versions": {"jax": "0.10.2"},
  "seed": 17,
  "skipped": {"dmd2/student": 0, "dmd2/critic": 2},
  "hints": ["the gradient of the critic is <large>"],
  "config": {"data": {"name": "digits", "batch_size": 64}, "lr": 2e-4},
  "classifier_accuracy": 0.878,
  "parameters": {"dmd2/student": 1234567},
}


class _Reader(html.parser.HTMLParser):
  """Tags with attributes, tables as lists of rows, and balance."""

  _VOID = {"meta", "img", "source", "br", "link"}

  def __init__(self, page):
    super().__init__()
    self.tags, self.open, self.tables, self.cell = [], [], [], None
    self.feed(page)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self._VOID:
      self.open.append(tag)
    if tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("td", "th"):
      self.tables[-1][-1].append([dict(attrs).get("class", ""), ""])
      self.cell = self.tables[-1][-1][-1]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag
    if tag in ("td", "th"):
      self.cell = None

  def handle_data(self, data):
    if self.cell is not None:
      self.cell[1] += data

  def all(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]


def _text(table):
  return [[cell[1] for cell in row] for row in table]


def _figure(title="Dots", **fields):
  def draw(figure, style):
    figure.add_subplot().plot([1, 2], color=style.colours[0])

  made = report.Figure(title, "Two dots.", draw, (2.0, 1.0), {"y": [1, 2]})
  return made._replace(**fields)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "new"
  workdir.mkdir()
  (workdir / "metrics.jsonl").write_text(
    "".join(
      json.dumps({"stage": "dmd2", "step": i, "student/loss": 1.0 / i}) + "\n"
      for i in range(1, 9)
    )
  )
  images = np.linspace(-1, 1, 3 * 2 * 2).reshape(3, 2, 2, 1)
  figures = [
    report.image_grid([("real", images), ("<model>", -images)], list("abc")),
    report.scatter_grid([("data", np.eye(2)), ("model", -np.eye(2))]),
    *report.curves(workdir / "metrics.jsonl"),
  ]
  path = report.write_report(
    workdir,
    title="A & B",
    lead="It was <trained>.",
    summary=SUMMARY,
    figures=figures,
    command="python -m experiments.train --config='x.py'",
  )
  page = path.read_text()
  return path, page, _Reader(page)


class TestPage:
  def test_asks_the_network_for_nothing(self, written):
    path, page, reader = written
    assert path.name == "report.html"
    bare = re.sub(r"data:[a-z/+]+;base64,[A-Za-z0-9+/=]+", "", page)
    assert len(bare) < len(page) / 2
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link", bare)
    for _, attrs in reader.tags:
      for name in ("src", "srcset", "href"):
        assert attrs.get(name, "data:").startswith(("data:", "#"))
    policies = [a for a in reader.all("meta") if "http-equiv" in a]
    assert policies[0]["content"].startswith("default-src 'none'")

  def test_every_figure_in_both_appearances_and_for_everyone(self, written):
    _, page, reader = written
    images, sources = reader.all("img"), reader.all("source")
    # Grid, scatter, score chart, curves.
    assert len(images) == len(sources) == 4
    assert page.count("<figure") == page.count("<figcaption>") == 4
    for image, source in zip(images, sources):
      assert source["media"] == "(prefers-color-scheme: dark)"
      assert source["srcset"] != image["src"]
      assert len(image["alt"]) > 20
      for data in (image["src"], source["srcset"]):
        kind, content = data.split(";base64,")
        raw = base64.b64decode(content)
        if kind == "data:image/png":
          assert raw.startswith(b"\x89PNG")
        else:
          assert kind == "data:image/svg+xml" and b"<svg" in raw
    kinds = [image["src"].split(";")[0][11:] for image in images]
    assert kinds == ["png", "png", "svg+xml", "svg+xml"]

  def test_a_csv_beside_everything_and_inside_the_page(self, written):
    path, page, reader = written
    links = [a for a in reader.all("a") if "download" in a]
    names = [a["download"] for a in links]
    assert names == [
      "samples_by_class.csv",
      "samples_in_the_plane.csv",
      "fcd_at_a_glance.csv",
      "scores.csv",
      "training_dmd2.csv",
      "timing.csv",
      "config.csv",
    ]
    for link in links:
      beside = (path.parent / "report" / link["download"]).read_bytes()
      inside = base64.b64decode(link["href"].split("base64,")[1])
      assert beside == inside and beside.count(b"\n") > 1
    # Nothing half-written is left anywhere.
    files = {p.name for p in path.parent.rglob("*") if p.is_file()}
    assert files == {*names, "report.html", "metrics.jsonl"}

  def test_score_table(self, written):
    _, page, reader = written
    table = reader.tables[0]
    assert _text(table) == [
      ["model", "n", "FCD ↓", "MMD² ↓", "precision ↑"],
      ["teacher, 20 steps", "2,000", "4.13", "0.000930", "0.861"],
      ["teacher, 1 step", "2,000", "33.10", "0.014200", "0.981"],
      ["student, 1 step", "2,000", "5.28", "−0.001210", "0.872"],
      ["floor: test vs train", "397", "0.46", "0.000010", "0.863"],
      ["floor: <noise>", "2,000", "125.50", "0.117500", "0.228"],
    ]
    best = [cell[1] for row in table for cell in row if cell[0] == "best"]
    # Per column, among the models only: floors are never the best.
    assert sorted(best) == sorted(["4.13", "−0.001210", "0.981"])
    assert "87.8 %" in page

  def test_csv_holds_the_scores_as_they_are(self, written):
    path, _, _ = written
    with (path.parent / "report" / "scores.csv").open() as file:
      rows = list(csv.DictReader(file))
    assert len(rows) == 15
    assert rows[1] == {
      "model": "teacher",
      "steps": "20",
      "metric": "mmd",
      "value": "0.00093",
      "n": "2000",
    }
    assert rows[9]["steps"] == ""

  def test_headline_numbers(self, written):
    _, page, _ = written
    tiles = re.findall(
      r'<div class="(tile[^"]*)"><b>(.*?)</b><span>(.*?)</span>', page
    )
    assert tiles == [
      ("tile", "4.13", "FCD: teacher, 20 steps"),
      ("tile", "33.1", "FCD: teacher, 1 step"),
      ("tile main", "5.28", "FCD: student, 1 step"),
      ("tile", "0.455", "FCD: floor (test vs train)"),
      ("tile", "3 min 17 s", "wall time in all"),
    ]

  def test_times(self, written):
    _, _, reader = written
    assert _text(reader.tables[1]) == [
      ["stage", "wall time", "CPU time", "of it compiling"],
      ["teacher", "92.4 s", "118.0 s", "6.5 s"],
      ["dmd2", "104.9 s", "141.3 s", "–"],
      ["total", "197.3 s", "259.3 s", "6.5 s"],
      ["peak memory of training", "host 3,072 MiB, device 1 MiB"],
    ]

  def test_csv_of_times(self, written):
    path, _, _ = written
    assert (path.parent / "report" / "timing.csv").read_text() == (
      "stage,seconds,cpu_seconds,compile_seconds\n"
      "teacher,92.4,118,6.5\n"
      "dmd2,104.94,141.3,\n"
    )

  def test_guard_and_how_to_reproduce(self, written):
    _, page, reader = written
    assert _text(reader.tables[2]) == [
      ["stage / network", "skipped steps"],
      ["dmd2/student", "0"],
      ["dmd2/critic", "2"],
    ]
    assert "the gradient of the critic is &lt;large&gt;" in page
    facts = dict(_text(reader.tables[3])[1:])
    assert facts == {
      "seed": "17",
      "SHA-256 of the final student's parameters": "9f86d081" * 8,
      "parameters of dmd2/student": "1,234,567",
      "jax": "0.10.2",
    }
    config = dict(_text(reader.tables[4])[1:])
    assert config == {
      "data.name": "digits",
      "data.batch_size": "64",
      "lr": "0.0002",
    }
    # Collapsed: a details element that is not open.
    assert reader.all("details") == [{}]

  def test_text_is_escaped(self, written):
    _, page, _ = written
    assert "<title>A &amp; B</title>" in page
    assert "It was &lt;trained&gt;." in page
    assert "floor: &lt;noise&gt;" in page
    assert "--config=&#x27;x.py&#x27;" in page


class TestWriteReport:
  def _write(self, workdir, **fields):
    words = {
      "title": "t",
      "lead": "l",
      "summary": {},
      "figures": [],
      "command": "c",
    }
    return report.write_report(workdir, **{**words, **fields})

  def test_nothing_to_show(self, tmp_path):
    page = self._write(tmp_path / "a" / "b").read_text()
    reader = _Reader(page)
    assert not reader.all("img") and not reader.tables
    sections = [a["id"] for a in reader.all("section")]
    assert sections == ["guard_and_diagnostics", "how_to_reproduce"]
    assert [a["href"] for a in reader.all("a")] == [f"#{s}" for s in sections]

  def test_no_step_skipped_says_so(self, tmp_path):
    page = self._write(tmp_path, summary={"skipped": {"student": 0}})
    assert "every gradient was finite (student)" in page.read_text()

  def test_one_time_of_compilation(self, tmp_path):
    summary = {"seconds": {"a": 2.0}, "compile_seconds": 1.25}
    page = self._write(tmp_path, summary=summary).read_text()
    assert "Compilation took 1.2 s of it." in page

  def test_a_score_that_is_not_finite_is_shown_and_never_best(self, tmp_path):
    summary = {
      "scores": [
        *_rows("student", 1, [float("nan"), float("inf"), 0.5]),
        *_rows("student", 2, [7.0, 3.0, 0.25]),
      ],
    }
    reader = _Reader(self._write(tmp_path, summary=summary).read_text())
    (_, first, second) = reader.tables[0]
    assert first[2] == ["broken", "NaN"] and first[3] == ["broken", "∞"]
    assert second[2][0] == second[3][0] == "best"
    assert first[4] == ["best", "0.500"] and second[4][0] == ""

  def test_scores_of_the_plane(self, tmp_path):
    names = ("sliced_wasserstein", "modes", "unheard_of")
    rows = lambda model, values: [
      {"model": model, "steps": 1, "metric": m, "value": v, "n": 10}
      for m, v in zip(names, values)
    ]
    summary = {"scores": rows("a", [0.06, 8.0, 1e-9]) + rows("b", [1, 7, 2])}
    reader = _Reader(self._write(tmp_path, summary=summary).read_text())
    assert _text(reader.tables[0]) == [
      ["model", "n", "SW₂ ↓", "modes ↑", "unheard_of"],
      ["a, 1 step", "10", "0.0600", "8", "1.00·10−9"],
      ["b, 1 step", "10", "1.0000", "7", "2.00"],
    ]
    best = [c[1] for row in reader.tables[0] for c in row if c[0] == "best"]
    assert best == ["0.0600", "8"]

  def test_a_figure_that_fails_costs_only_itself(self, tmp_path, caplog):
    def broken(figure, style):
      raise RuntimeError("no <ink>\nsecond line")

    figures = [_figure("One", draw=broken), _figure("Two")]
    with caplog.at_level(logging.WARNING):
      page = self._write(tmp_path, figures=figures).read_text()
    assert "could not be drawn: no &lt;ink&gt;" in page
    assert len(_Reader(page).all("img")) == 1
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert (tmp_path / "report" / "one.csv").read_text() == "y\n1\n2\n"

  def test_titles_may_repeat(self, tmp_path):
    self._write(tmp_path, figures=[_figure(), _figure(data={"y": [3.0]})])
    assert (tmp_path / "report" / "dots.csv").read_text() == "y\n1\n2\n"
    assert (tmp_path / "report" / "dots_2.csv").read_text() == "y\n3\n"

  def test_columns_of_unequal_length(self, tmp_path):
    with helpers.one_line_error("data must be columns of equal length"):
      self._write(tmp_path, figures=[_figure(data={"a": [1], "b": []})])

  def test_all_or_nothing(self, tmp_path, monkeypatch):
    path = self._write(tmp_path, title="old")
    monkeypatch.setattr(
      os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
      self._write(tmp_path, title="new")
    assert "<title>old</title>" in path.read_text()
    assert not list(tmp_path.rglob("*.tmp"))

  def test_readable_by_others(self, tmp_path):
    path = report.write_atomically(tmp_path / "x", b"abc")
    plain = tmp_path / "plain"
    plain.write_bytes(b"abc")
    assert path.stat().st_mode == plain.stat().st_mode

  def test_same_input_same_picture(self):
    for vector in (True, False):
      figure = _figure(vector=vector)
      first = report.render(figure, report.LIGHT)
      assert first == report.render(figure, report.LIGHT)
      assert first != report.render(figure, report.DARK)


class TestImageGrid:
  def test_data(self):
    images = np.array([[-1.0, 1.0], [0.2, 7.0]]).reshape(2, 1, 2, 1)
    figure = report.image_grid([("m", images)], ["a", "b"])
    assert dict(figure.data) == {
      "row": ["m", "m"],
      "column": ["a", "b"],
      "height": [1, 1],
      "width": [2, 2],
      "channels": [1, 1],
      # (x + 1) / 2 * 255, clipped.
      "pixels": ["0 255", "153 255"],
    }
    assert not figure.vector

  def test_pixels(self):
    images = np.array([-1.0, 1.0, 0.0, np.nan, 9.0]).reshape(1, 1, 5, 1)
    shown = report_figures._pixels(images)[0, 0]
    np.testing.assert_allclose(
      shown, [[0] * 3, [1] * 3, [0.5] * 3, [1, 0, 1], [1] * 3]
    )

  def test_where_everything_is(self):
    # The picture itself: one row of one red and one black image.
    images = -np.ones((2, 4, 4, 3))
    images[0, ..., 0] = 1.0
    figure = report.image_grid([("m", images), ("m", images)], ["a", "b"])
    import matplotlib.figure

    canvas = matplotlib.figure.Figure(figsize=figure.size)
    figure.draw(canvas, report.LIGHT)
    (axes,) = canvas.axes
    array = axes.images[0].get_array()
    x, y = axes.get_xticks(), axes.get_yticks()
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b"]
    # Equal consecutive labels are written once, in the middle of their rows.
    assert [t.get_text() for t in axes.get_yticklabels()] == ["m"]
    np.testing.assert_allclose(y, array.shape[0] / 2)
    np.testing.assert_allclose(x.mean(), array.shape[1] / 2)
    above = array.shape[0] // 4
    np.testing.assert_allclose(array[above, int(x[0])], [1, 0, 0, 1])
    np.testing.assert_allclose(array[above, int(x[1])], [0, 0, 0, 1])
    # The gap between them is transparent.
    assert array[above, array.shape[1] // 2, 3] == 0.0

  def test_bad_input(self):
    x = np.zeros((2, 4, 4, 1))
    with helpers.one_line_error("rows must be at least one row"):
      report.image_grid([], ["a"])
    with helpers.one_line_error("images of 'm' must be 3 like column_names"):
      report.image_grid([("m", x)], list("abc"))
    with helpers.one_line_error(r"images of 'n' must be of size \[4, 4, 1\]"):
      report.image_grid([("m", x), ("n", x[:, :2])], list("ab"))
    with helpers.one_line_error(r"must be \[c, h, w, ch\] \(rank 4\)"):
      report.image_grid([("m", x[0])], list("ab"))
    with helpers.one_line_error("channels of 'm' must be 1 or 3, got 2"):
      report.image_grid([("m", np.zeros((2, 4, 4, 2)))], list("ab"))


class TestScatterGrid:
  def test_data_and_shared_window(self):
    import matplotlib.figure

    a = np.array([[0.0, 0.0], [1.0, 3.0]])
    b = np.array([[np.nan, 0.0], [-1.0, 1.0]])
    figure = report.scatter_grid([("a", a), ("b", b)])
    assert figure.data["panel"] == ["a", "a", "b", "b"]
    np.testing.assert_array_equal(figure.data["x1"], [0, 1, np.nan, -1])
    np.testing.assert_array_equal(figure.data["x2"], [0, 3, 0, 1])
    canvas = matplotlib.figure.Figure(figsize=figure.size)
    figure.draw(canvas, report.LIGHT)
    first, second = canvas.axes
    assert second.get_title() == "b (1 not finite)"
    assert first.get_xlim() == second.get_xlim()
    # Square, and wide enough for the longest side, 3.
    low, high = first.get_xlim()
    bottom, top = first.get_ylim()
    assert high - low == pytest.approx(top - bottom)
    assert bottom < 0.0 and top > 3.0 and low < -1.0 and high > 1.0

  def test_bad_input(self):
    with helpers.one_line_error("panels must be at least one panel"):
      report.scatter_grid([])
    with helpers.one_line_error(r"points of 'a' must be \[n, 2\]"):
      report.scatter_grid([("a", np.zeros((3, 1)))])


class TestCurves:
  def _write(self, tmp_path, *lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
      "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    )
    return path

  def test_read_metrics(self, tmp_path):
    path = self._write(
      tmp_path,
      {"stage": "a", "step": 20, "loss": 2.0, "note": "x", "seconds": 3.0},
      {"stage": "a", "step": 10, "loss": 1.0, "kl": None},
      {"stage": "b", "step": 10, "loss": 5.0, "done": True},
      "",
      {"stage": "a", "step": 20, "loss": 4.0},
      '{"stage": "b", "st',
    )
    series = report.read_metrics(path)
    assert {s: list(n) for s, n in series.items()} == {
      "a": ["loss", "kl"],
      "b": ["loss"],
    }
    # Sorted, and the later line of a step counts.
    np.testing.assert_array_equal(series["a"]["loss"], [[10, 20], [1.0, 4.0]])
    np.testing.assert_array_equal(series["a"]["kl"], [[10], [np.nan]])
    assert report.read_metrics(tmp_path / "none") == {}
    assert report.curves(tmp_path / "none") == []

  def test_a_broken_line_in_the_middle_is_named(self, tmp_path):
    path = self._write(tmp_path, '{"stage', {"stage": "a", "step": 1})
    with helpers.one_line_error("line 1 of .* must be JSON"):
      report.read_metrics(path)

  def test_smooth(self):
    values = np.array([1.0, 5.0, np.nan, 3.0, 8.0, 2.0])
    # Windows of 3, cut evenly at the ends, NaN left out.
    np.testing.assert_allclose(
      report_figures.smooth(values, width=3),
      [1.0, 3.0, 4.0, 5.5, 13.0 / 3.0, 2.0],
    )
    np.testing.assert_allclose(
      report_figures.smooth(values, width=5),
      [1.0, 3.0, 17.0 / 4.0, 4.5, 13.0 / 3.0, 2.0],
    )
    line = np.arange(30.0)
    np.testing.assert_allclose(report_figures.smooth(line, width=7), line)
    # One huge value does not reach beyond its window.
    huge = np.where(np.arange(30) == 5, 1e30, 0.1)
    np.testing.assert_allclose(
      report_figures.smooth(huge, width=3)[8:], 0.1, rtol=1e-12
    )
    np.testing.assert_array_equal(
      report_figures.smooth(np.full(3, np.nan), width=3), np.full(3, np.nan)
    )
    assert report_figures.smooth([], width=3).shape == (0,)

  def test_panels(self, tmp_path):
    import matplotlib.figure

    path = self._write(
      tmp_path,
      *(
        {
          "stage": "s",
          "step": i,
          "samples_per_second": 10.0 + i,
          "critic/loss": i - 3.0,
          "student/grad_norm": 1.0,
          "student/loss": 10.0**-i,
          "student/learning_rate": 10.0**-i,
        }
        for i in range(1, 6)
      ),
    )
    (figure,) = report.curves(path)
    assert figure.title == "Training: s"
    canvas = matplotlib.figure.Figure(figsize=figure.size)
    figure.draw(canvas, report.LIGHT)
    shown = [a for a in canvas.axes if a.get_visible()]
    # Losses first, the student's before the others', then the means, then
    # speed.
    assert [a.get_title(loc="left") for a in shown] == [
      "student/loss",
      "critic/loss",
      "student/grad_norm",
      "student/learning_rate",
      "samples_per_second",
    ]
    # Logarithmic: positive and over more than a factor of 30; never a rate.
    assert [a.get_yscale() for a in shown] == ["log"] + 4 * ["linear"]
    assert [a.get_ylabel() for a in shown] == [
      "loss",
      "loss",
      "L2 norm",
      "per step",
      "samples / s",
    ]
    assert {a.get_xlabel() for a in shown} == {"step"}
    # What does not vary is not magnified.
    assert shown[2].get_ylim() == (0.5, 1.5)
    colours = [a.lines[-1].get_color() for a in shown]
    assert colours[0] == colours[2] == colours[3] != colours[1]
    assert colours[4] == report.LIGHT.muted
    raw, smoothed = shown[0].lines
    assert raw.get_alpha() < 0.5 and smoothed.get_alpha() is None
    data = figure.data
    assert len(data["step"]) == 25 and data["metric"][0] == "student/loss"
    assert data["value"][:2] == [0.1, 0.01]

  def test_many_metrics_are_split(self, tmp_path):
    path = self._write(
      tmp_path,
      {"stage": "s", "step": 1, **{f"m{i:02d}": 1.0 for i in range(26)}},
    )
    first, second = report.curves(path)
    assert second.title == "Training: s, part 2"
    assert len(set(first.data["metric"])) == 24
    assert second.data["metric"] == ["m24", "m25"]


class TestScoreChart:
  def _draw(self, figure):
    import matplotlib.figure

    canvas = matplotlib.figure.Figure(figsize=figure.size)
    figure.draw(canvas, report.LIGHT)
    return canvas.axes[0]

  def test_models_and_floors(self):
    figure = report.score_chart(
      SUMMARY["scores"], SUMMARY["floors"], metric="fcd", label="FCD"
    )
    axes = self._draw(figure)
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "FCD (lower is better, log scale)"
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names == ["teacher, 20 steps", "teacher, 1 step", "student, 1 step"]
    # The first row on top.
    assert list(axes.get_yticks()) == [2, 1, 0]
    texts = [t.get_text() for t in axes.texts]
    assert texts == [
      "4.13",
      "33.1",
      "5.28",
      "test vs train\n0.455",
      "<noise>\n126",
    ]
    low, high = axes.get_xlim()
    assert low < 0.455 and high > 125.5
    buffer = io.StringIO(report._csv(figure.data).decode())
    assert list(csv.DictReader(buffer))[3] == {
      "model": "floor: test vs train",
      "steps": "",
      "kind": "floor",
      "value": "0.455",
      "n": "397",
    }

  def test_linear_and_higher(self):
    figure = report.score_chart(
      SUMMARY["scores"], [], metric="precision", higher_is_better=True
    )
    axes = self._draw(figure)
    assert axes.get_xlabel() == "precision (higher is better)"
    assert axes.get_xlim()[0] == 0.0

  def test_nothing_finite(self):
    assert report.score_chart([], SUMMARY["floors"], metric="fcd") is None
    rows = _rows("a", 1, [float("nan")])
    assert report.score_chart(rows, [], metric="fcd") is None


@pytest.mark.parametrize(
  "value, shown",
  [
    (None, "–"),
    (0.0, "0"),
    (-2.0, "−2.00"),
    (12345.6, "12,346"),
    (0.00123, "0.00123"),
    (1.5e-7, "1.50·10<sup>−7</sup>"),
    (2e9, "2.00·10<sup>9</sup>"),
    (float("-inf"), "-∞"),
  ],
)
def test_number(value, shown):
  assert report._number(value) == shown


@pytest.mark.parametrize(
  "value, shown",
  [
    (None, "–"),
    (0.04, "0.0 s"),
    (119.94, "119.9 s"),
    (120.0, "2 min 0 s"),
    (3725.0, "1 h 2 min"),
    (float("nan"), "NaN"),
  ],
)
def test_seconds(value, shown):
  assert report._seconds(value) == shown
