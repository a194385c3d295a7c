"""Why a run with a fake score oscillates: three curves and what they say.

A student that follows the difference of a teacher and a critic is right only
while the critic knows the student's present samples. Three numbers show it: the
critic's loss (rising: it falls behind), the ratio of the two gradients' norms
(running away: the time scales have parted) and the spread of the samples
(shrinking: modes are lost).
"""

import os

import numpy as np

from distilljax.train import report_figures
from distilljax.train.report_figures import Figure

# Fewer log lines say nothing about a trend.
_LEAST_LINES = 8
# Medians of the last quarter of the lines against others.
RISE = 1.5
SHRINK = 0.5
DRIFT = 10.0
# Spread (90th - 10th percentile) over median, in the last half.
SWING = 1.0


def _quarters(values: np.ndarray) -> list[float]:
  return [float(np.median(q)) for q in np.array_split(values, 4)]


def _hints(stage, loss, ratio, spread) -> list[str]:
  """Sentences for what the medians of the quarters show."""
  hints = []
  if len(loss) >= _LEAST_LINES:
    *before, last = _quarters(loss)
    if last > RISE * min(before):
      hints.append(
        f"{stage}: the critic falls behind: its loss rose from"
        f" {min(before):.3g} to {last:.3g}. Update it more often (`ratio`),"
        " raise its learning rate or lower the student's."
      )
    half = loss[len(loss) // 2 :]
    low, middle, high = np.percentile(half, [10, 50, 90])
    if high - low > SWING * middle:
      hints.append(
        f"{stage}: the critic's loss swings between {low:.3g} and {high:.3g} in"
        " the second half. Lower the learning rates, set Adam's b1 to 0, or use"
        " a larger batch."
      )
  if len(spread) >= _LEAST_LINES:
    first, *_, last = _quarters(spread)
    if last < SHRINK * first:
      hints.append(
        f"{stage}: samples lose their spread: from {first:.3g} to {last:.3g}."
        " Modes are being dropped: warm up by regression, or add the GAN term."
      )
  if len(ratio) >= _LEAST_LINES:
    first, *_, last = _quarters(ratio)
    if max(last / first, first / last) > DRIFT:
      hints.append(
        f"{stage}: the critic's gradient over the student's went from"
        f" {first:.3g} to {last:.3g}: the two time scales part. Clip both norms"
        " (`clip_norm`)."
      )
  return hints


def fake_score(
  metrics_path: str | os.PathLike,
) -> tuple[list[Figure], list[str]]:
  """Curves and hints of the stages with a critic of the student's samples.

  Such a stage logs `student/sample_std` and `critic/denoising`.

  Args:
    metrics_path: a metrics.jsonl, see `report_figures.read_metrics`.

  Returns:
    (figures, hints): one figure a stage, whose title begins with "Training";
    sentences for the report's `hints`, none where nothing stands out.
  """
  figures, hints = [], []
  for stage, series in report_figures.read_metrics(metrics_path).items():
    if "student/sample_std" not in series or "critic/denoising" not in series:
      continue
    panels = {
      "critic loss": series["critic/denoising"],
      "sample std": series["student/sample_std"],
    }
    norms = [series.get(f"{n}/grad_norm") for n in ("critic", "student")]
    if all(n is not None for n in norms):
      steps, at, other = np.intersect1d(
        norms[0][0], norms[1][0], return_indices=True
      )
      top, bottom = norms[0][1][at], norms[1][1][other]
      fine = np.isfinite(top) & np.isfinite(bottom) & (bottom > 0) & (top > 0)
      if fine.any():
        panels["gradient ratio"] = (steps[fine], top[fine] / bottom[fine])
    finite = {
      name: values[np.isfinite(values)] for name, (_, values) in panels.items()
    }
    hints += _hints(
      stage,
      finite["critic loss"],
      finite.get("gradient ratio", np.zeros(0)),
      finite["sample std"],
    )
    figures.append(_figure(stage, panels))
  return figures, hints


def _figure(stage, panels) -> Figure:
  def draw(figure, style):
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for i, (axes, (name, (steps, values))) in enumerate(
      zip(grid, panels.items())
    ):
      axes.plot(steps, values, color=style.colours[i % len(style.colours)])
      if name == "gradient ratio":
        axes.set_yscale("log")
      axes.set_title(name, loc="left")
      axes.set_xlabel("step")
      axes.grid(True)

  data = {"step": [], "metric": [], "value": []}
  for name, (steps, values) in panels.items():
    data["step"] += steps.tolist()
    data["metric"] += [name] * len(steps)
    data["value"] += values.tolist()
  caption = (
    f"Stage “{stage}”: the critic's loss on the student's samples, the"
    " standard deviation of the samples within a row, and the norm of the"
    " critic's gradient over the student's. A critic that falls behind, a ratio"
    " that runs away or a shrinking spread is why such a run oscillates."
  )
  size = (report_figures.WIDTH, 2.6)
  return Figure(f"Training: {stage}, fake score", caption, draw, size, data)
