"""Hints about a fake score: each cause alone raises its own sentence."""

import json

import numpy as np
import pytest

from distilljax.train import diagnostics, report
from distilljax.train.report_figures import LIGHT

STEPS = 10 * np.arange(1, 17)
FLAT = np.ones(16)
# Quarters of four lines each, by hand.
QUARTERS = np.repeat(np.arange(4), 4)


def write(folder, loss=FLAT, spread=FLAT, critic=FLAT, student=FLAT, **more):
  path = folder / "metrics.jsonl"
  rows = [
    {
      "stage": "student",
      "step": int(s),
      "critic/denoising": float(loss[i]),
      "student/sample_std": float(spread[i]),
      "critic/grad_norm": float(critic[i]),
      "student/grad_norm": float(student[i]),
      **more,
    }
    for i, s in enumerate(STEPS[: len(loss)])
  ]
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  return path


def test_a_calm_run_has_a_plot_and_no_hint(tmp_path):
  path = write(tmp_path, critic=3 * FLAT, student=2 * FLAT)
  (figure,), hints = diagnostics.fake_score(path)
  assert hints == []
  assert figure.title == "Training: student, fake score"
  data = list(zip(*figure.data.values()))
  assert (10, "critic loss", 1.0) in data
  assert (160, "gradient ratio", 1.5) in data
  assert len(data) == 3 * 16
  assert report.render(figure, LIGHT).startswith(b"<")


@pytest.mark.parametrize(
  "series,said",
  [
    ({"loss": np.choose(QUARTERS, [2, 1, 1, 1.6])}, ["falls behind"]),
    ({"loss": np.choose(QUARTERS, [2, 1, 1, 1.4])}, []),
    ({"loss": np.choose(QUARTERS, [9, 2, 1, 1])}, []),  # falling is well
    # A swing of 1.5 around medians that stay.
    ({"loss": np.tile([0.5, 1, 1, 2.0], 4)}, ["swings"]),
    ({"loss": np.tile([0.8, 1, 1, 1.2], 4)}, []),
    ({"spread": np.choose(QUARTERS, [1, 0.8, 0.6, 0.4])}, ["lose their"]),
    ({"spread": np.choose(QUARTERS, [1, 0.8, 0.6, 0.6])}, []),
    ({"critic": np.choose(QUARTERS, [1, 1, 1, 11.0])}, ["time scales part"]),
    ({"student": np.choose(QUARTERS, [1, 1, 1, 11.0])}, ["time scales part"]),
    ({"critic": np.choose(QUARTERS, [1, 1, 1, 9.0])}, []),
    ({"loss": np.array([1, 1, 1, 1, 9, 9, 9.0])}, []),  # too few lines
  ],
)
def test_hints(tmp_path, series, said):
  _, hints = diagnostics.fake_score(write(tmp_path, **series))
  assert len(hints) == len(said), hints
  for hint, words in zip(hints, said):
    assert words in hint and hint.startswith("student: ")


def test_stages_without_a_critic_are_passed_over(tmp_path):
  path = tmp_path / "metrics.jsonl"
  assert diagnostics.fake_score(path) == ([], [])
  path.write_text('{"stage": "teacher", "step": 1, "student/loss": 2.0}\n')
  assert diagnostics.fake_score(path) == ([], [])


def test_no_ratio_without_a_gradient(tmp_path):
  (figure,), hints = diagnostics.fake_score(write(tmp_path, student=0 * FLAT))
  assert hints == [] and "gradient ratio" not in figure.data["metric"]
