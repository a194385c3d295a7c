"""What happens around steps: progress, periodic calls."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Moment(NamedTuple):
  """What a hook may look at.

  Attributes:
    stage: the `Stage`.
    step: steps done in it.
    state: the `State` after them (donated by the next step: do not keep it).
    frozen: frozen networks by name.
    values: means since the last log line; empty between log lines.
  """

  stage: Any
  step: int
  state: Any
  frozen: Mapping[str, Any]
  values: Mapping[str, float]


class Hook:
  """Override what is needed; every call gets a `Moment`."""

  def on_start(self, moment: Moment) -> None:
    """Before the first step of a stage (in this process)."""

  def on_step(self, moment: Moment) -> Mapping[str, float] | None:
    """After every step; what is returned goes into metrics.jsonl."""

  def on_log(self, moment: Moment) -> None:
    """After every step at which metrics were written."""

  def on_end(self, moment: Moment) -> None:
    """After a stage's last step, or when the run is interrupted."""


class Progress(Hook):
  """A progress bar with ETA, losses and samples a second, or lines.

  Args:
    batch_size: rows a step, for samples a second.
    file: where to write; a terminal gets a bar, anything else a line every
      `line_every` seconds.
    line_every: seconds between lines.
  """

  def __init__(self, file: Any = None, line_every: float = 10.0):
    self._file = sys.stderr if file is None else file
    self._line_every = line_every
    self._bar = None

  def on_start(self, moment: Moment) -> None:
    """See `Hook`."""
    import tqdm  # pylint: disable=g-import-not-at-top

    if jax.process_index() != 0:
      return
    self._last_line = time.monotonic()
    self._began = (time.monotonic(), moment.step)
    if self._file.isatty():
      self._bar = tqdm.tqdm(
        total=moment.stage.steps,
        initial=moment.step,
        desc=moment.stage.name,
        file=self._file,
        dynamic_ncols=True,
        unit="step",
      )

  def on_step(self, moment: Moment) -> None:
    """See `Hook`."""
    if self._bar is not None:
      self._bar.update(moment.step - self._bar.n)

  def on_log(self, moment: Moment) -> None:
    """See `Hook`."""
    if jax.process_index() != 0:
      return
    losses = {k: v for k, v in moment.values.items() if k.endswith("/loss")}
    text = " ".join(f"{k}={v:.4g}" for k, v in losses.items())
    rate = moment.values.get("samples_per_second")
    if rate is not None:
      text += f" {rate:.0f} samples/s"
    if self._bar is not None:
      self._bar.set_postfix_str(text)
      return
    now = time.monotonic()
    done = moment.step >= moment.stage.steps
    if now - self._last_line < self._line_every and not done:
      return
    self._last_line = now
    began, first = self._began
    left = (moment.stage.steps - moment.step) * (now - began)
    left /= max(moment.step - first, 1)
    print(
      f"{moment.stage.name}: step {moment.step}/{moment.stage.steps},"
      f" {left:.0f} s left, {text}",
      file=self._file,
      flush=True,
    )

  def on_end(self, moment: Moment) -> None:
    """See `Hook`."""
    if self._bar is not None:
      self._bar.close()
      self._bar = None


class Every(Hook):
  """Calls `fn(moment)` every `steps` steps: evaluation, samples, anything.

  What `fn` returns, if anything, is written to metrics.jsonl.
  """

  def __init__(
    self, steps: int, fn: Callable[[Moment], Mapping[str, float] | None]
  ):
    self._steps = steps
    self._fn = fn

  def on_step(self, moment: Moment) -> Mapping[str, float] | None:
    """See `Hook`."""
    if moment.step % self._steps:
      return None
    return self._fn(moment)
