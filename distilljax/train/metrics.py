"""Metrics as (sum, count) pairs, and the JSON-lines file they end in.

A mean over a batch that is cut over devices, micro-batches or steps is the sum
of the sums over the sum of the counts, divided once, when it is written.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from distilljax.losses import reduction


class Mean(NamedTuple):
  """A mean that is not divided yet: sum over entries, number of entries."""

  sum: jax.Array
  count: jax.Array

  def compute(self) -> float:
    """The mean as a Python float; NaN where nothing was counted."""
    count = float(self.count)
    return float(self.sum) / count if count else math.nan


def mean(values: jax.Array, where: jax.Array | None = None) -> Mean:
  """`Mean` of unreduced loss values: what a loss returns as a term.

  Args:
    values: per-row or per-token values. Shape [*b].
    where: which entries count; None counts all. Shape [*b], bool.

  Returns:
    Their sum and count, not divided.
  """
  return Mean(*reduction.masked_sum_and_count(values, where))


def weighted(weight: float | jax.Array, term: Mean) -> Mean:
  """`term` with its sum times `weight`: a loss weight inside a term.

  Args:
    weight: a number, or a scalar array.
    term: what `mean` returned.

  Returns:
    The term with its sum scaled and its count as it was.
  """
  return Mean(term.sum * weight, term.count)


def once(value: jax.Array) -> Mean:
  """A number of which a step has one (a norm, a rate) as a `Mean`.

  Args:
    value: a scalar.

  Returns:
    The value with count 1.
  """
  return Mean(jnp.asarray(value, jnp.float32), jnp.float32(1))


class Totals:
  """Adds up the metrics of steps without reading a device.

  The steps' scalars are kept as they come and read in one go, so the loop never
  waits for a device between two writes; sums are then exact in float64.
  """

  def __init__(self):
    self._steps: list[Mapping[str, Mean]] = []

  def add(self, metrics: Mapping[str, Mean]) -> None:
    """Takes the metrics of one step (names may differ from step to step)."""
    self._steps.append(metrics)

  def flush(self) -> dict[str, float]:
    """Means since the last flush, by name; reads the devices once."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for metrics in jax.device_get(self._steps):
      for name, value in metrics.items():
        sums[name] = sums.get(name, 0.0) + float(value.sum)
        counts[name] = counts.get(name, 0.0) + float(value.count)
    self._steps = []
    return {
      name: sums[name] / counts[name] for name in sums if counts[name] > 0
    }


class JsonLines:
  """`metrics.jsonl`: one object a line, in order, never twice the same step.

  Args:
    path: the file; it is created at the first write. None writes nothing.
  """

  def __init__(self, path: str | os.PathLike | None):
    self._path = None if path is None else pathlib.Path(path)

  def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
    """Appends one line; non-finite numbers are written as null."""
    if self._path is None:
      return
    clean = {
      k: (v if not isinstance(v, float) or math.isfinite(v) else None)
      for k, v in values.items()
    }
    with self._path.open("a") as f:
      f.write(json.dumps({"stage": stage, "step": step, **clean}) + "\n")

  def rewind(self, stage: str, step: int, earlier: list[str]) -> None:
    """Drops the lines that a run resumed at `step` of `stage` writes again.

    Args:
      stage: the stage at which the run goes on.
      step: lines of that stage after this step are dropped.
      earlier: names of the stages before it, whose lines are kept.
    """
    if self._path is None or not self._path.exists():
      return
    kept = []
    for line in self._path.read_text().splitlines():
      try:
        row = json.loads(line)
      except json.JSONDecodeError:  # the last line of a killed process
        continue
      if row["stage"] in earlier or (
        row["stage"] == stage and row["step"] <= step
      ):
        kept.append(line)
    temporary = self._path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, self._path)
