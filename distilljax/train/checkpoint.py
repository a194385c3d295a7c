"""Checkpoints of a stage: Orbax v1, atomic, the data iterator in the commit."""

import contextlib
import json
import logging
import math
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from distilljax.train.step import State


class SaveError(OSError):
  """A checkpoint could not be written; earlier ones are intact."""


class RestoreError(ValueError):
  """Checkpoints exist but none of them can be read."""


class Best(NamedTuple):
  """Which checkpoint is kept beside the newest ones.

  Attributes:
    metric: name of a value that a hook returns, such as "eval/fcd_1_steps".
    higher_is_better: its direction.
  """

  metric: str
  higher_is_better: bool

  def rank(self, metrics: Mapping[str, float] | None) -> float:
    """The better, the higher; -inf where the metric was not measured."""
    value = (metrics or {}).get(self.metric)
    if value is None:
      return -math.inf
    return value if self.higher_is_better else -value


def _storable(state: State) -> dict[str, Any]:
  """The state as a dict of arrays: typed keys become their words."""
  key = state.key
  if isinstance(key, jax.ShapeDtypeStruct):
    words = jax.eval_shape(jax.random.key_data, key)
    words = words.update(sharding=key.sharding)
  else:
    words = jax.random.key_data(key)
  return {**state._asdict(), "key": words}


def _state(stored: dict[str, Any]) -> State:
  key = jax.random.wrap_key_data(stored["key"], impl="threefry2x32")
  return State(**{**stored, "key": key})


def _words(host: dict[str, Any]) -> np.ndarray:
  return np.frombuffer(json.dumps(host).encode(), np.uint8)


def _record(words: Any) -> dict[str, Any]:
  return json.loads(np.asarray(words).tobytes())


class _Silence(logging.Filter):
  """Keeps the writers' tracebacks off the screen; the error says it."""

  # Exceptions of tasks that nobody awaits any more come up in asyncio's.
  _LOGGERS = logging.getLogger("absl"), logging.getLogger("asyncio")

  def __init__(self):
    super().__init__()
    self._hook = sys.unraisablehook

  def begin(self) -> None:
    for logger in self._LOGGERS:
      logger.addFilter(self)
    if sys.unraisablehook != self._unraisable:
      self._hook = sys.unraisablehook
      sys.unraisablehook = self._unraisable

  def end(self) -> None:
    for logger in self._LOGGERS:
      logger.removeFilter(self)
    if sys.unraisablehook == self._unraisable:
      sys.unraisablehook = self._hook

  def filter(self, record: logging.LogRecord) -> bool:
    paths = [record.pathname]
    if record.exc_info:
      paths += _files(record.exc_info[2])
    return not any(os.path.join("orbax", "checkpoint") in p for p in paths)

  def _unraisable(self, unraisable: Any) -> None:
    # Where one writer failed the event loop is closed; another that ends later
    # finds it so in a thread that is not Python's.
    closed = isinstance(unraisable.exc_value, RuntimeError) and any(
      p.endswith(os.path.join("asyncio", "base_events.py"))
      for p in _files(unraisable.exc_traceback)
    )
    if not closed:
      self._hook(unraisable)


def _files(trace: types.TracebackType | None) -> list[str]:
  return [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]


_SILENCE = _Silence()


def _reason(error: BaseException) -> str:
  """The innermost cause of a failed write, in one line."""
  text = " ".join(str(error).split()) or repr(error)
  for words in ("No space left on device", "File too large", "Disk quota"):
    if words in text:
      return words
  return text[:200]


def barrier(name: str, seconds: int = 600) -> None:
  """Waits until every process is here; one process does not wait.

  Args:
    name: of the place.
    seconds: how long to wait for the others.
  """
  if jax.process_count() > 1:
    from orbax.checkpoint import multihost  # noqa: PLC0415

    multihost.sync_global_processes(f"distilljax/{name}", timeout=seconds)


class Checkpoints:
  """The checkpoints of a stage: newest `keep`, each state + host record.

  A save is atomic: Orbax writes beside and renames. `save_async` returns when
  the state may be donated, and the files are written meanwhile; one save is in
  progress at a time. A checkpoint that cannot be read is moved aside (never
  deleted) and the one before it is used.

  Args:
    folder: where the stage's checkpoints lie.
    keep: how many of the newest are kept.
    best: keeps the best one too; None does not.
    log: gets one line for everything a person should know.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    keep: int = 2,
    best: Best | None = None,
    log: Callable[[str], None] = print,
  ):
    self.folder = pathlib.Path(folder).absolute()
    self._keep = keep
    self._best = best
    self._log = log
    self._checkpointer = None
    self._pending = None  # (step, response) of the save in progress

  def _open(self) -> ocp.training.Checkpointer:
    if self._checkpointer is None:
      policies = ocp.training.preservation_policies
      kept = [policies.LatestN(self._keep)]
      if self._best is not None:
        kept.append(
          policies.BestN(
            get_metric_fn=self._best.rank,
            n=1,
            keep_checkpoints_without_metrics=False,
          )
        )
      self._checkpointer = ocp.training.Checkpointer(
        self.folder,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(
          1
        ),
        preservation_policy=policies.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True,
      )
    return self._checkpointer

  def steps(self) -> list[int]:
    """Steps with a committed checkpoint, ascending."""
    if not self.folder.is_dir():
      return []
    return sorted(
      int(p.name)
      for p in self.folder.iterdir()
      if p.name.isdigit() and p.is_dir()
    )

  def best(self) -> tuple[int, float] | None:
    """Step and value of the best checkpoint, the one in progress included.

    None where none was measured.
    """
    if self._best is None:
      return None
    measured = [
      c
      for c in self._open().checkpoints
      if self._best.metric in (c.metrics or {})
    ]
    if not measured:
      return None
    # Of equals the last, as the policy has it.
    found = sorted(measured, key=lambda c: self._best.rank(c.metrics))[-1]
    return found.step, found.metrics[self._best.metric]

  def save(
    self, state: State, host: dict[str, Any], measured: float | None = None
  ) -> int:
    """Writes state and host record (JSON values) in one commit.

    Args:
      state: the state.
      host: what else a resumed run needs.
      measured: value of the `best` metric for this state; None where it was
        not measured.

    Returns:
      The step saved.

    Raises:
      SaveError: no space, no permission, ...: one line; older ones are intact.
    """
    step = self.save_async(state, host, measured)
    self.wait()
    return step

  def save_async(
    self, state: State, host: dict[str, Any], measured: float | None = None
  ) -> int:
    """Begins `save`, after the one before has ended; returns at once.

    The state may be donated from then on: its arrays have been copied off the
    device, or, on a CPU, are held until they are written. Whether the files
    were written is told by `check`, `wait`, `close` or the next save.

    Args:
      state: as for `save`.
      host: as for `save`.
      measured: as for `save`.

    Returns:
      The step that is being saved.

    Raises:
      SaveError: this save could not begin, or the one before has failed.
    """
    self.wait()
    step = int(state.step)
    if step in self.steps():
      return step
    metrics = None
    if self._best is not None and measured is not None:
      metrics = {self._best.metric: measured}
    _SILENCE.begin()
    with self._saving(step):
      response = self._open().save_checkpointables_async(
        step,
        {"state": _storable(state), "host": {"json": _words(host)}},
        metrics=metrics,
      )
      if response is None:
        raise OSError("the checkpointer did not begin")
    self._pending = step, response
    return step

  def check(self) -> None:
    """Takes note of a save that has ended; one that goes on is left alone.

    Raises:
      SaveError: it has failed; as for `save`.
    """
    if self._pending is not None:
      if not self._checkpointer.is_saving_in_progress():
        self.wait()

  def wait(self) -> None:
    """Waits for the save in progress, if any.

    Raises:
      SaveError: it has failed; as for `save`.
    """
    if self._pending is None:
      return
    (step, response), self._pending = self._pending, None
    with self._saving(step):
      response.result()
      if step not in self.steps():
        raise OSError("the checkpointer did not commit")
    # Not after a failure: its other writers may still have something to say.
    _SILENCE.end()

  @contextlib.contextmanager
  def _saving(self, step: int):
    """Turns what a writer raises into one line."""
    try:
      yield
    except Exception as e:  # Orbax and its writers raise many kinds
      self._abandon()
      for cause in (e, e.__cause__) if jax.process_count() > 1 else ():
        if isinstance(cause, jax.errors.JaxRuntimeError):
          raise cause from e  # another process is gone: no fault of the files
      intact = self.steps()
      raise SaveError(
        f"checkpoint: step {step} could not be saved in {self.folder}"
        f" ({_reason(e)}); last good checkpoint:"
        f" {f'step {intact[-1]}' if intact else 'none'}"
      ) from e

  def restore(
    self, abstract: State, step: int | None = None
  ) -> tuple[State, dict[str, Any]] | None:
    """The newest readable checkpoint, in the abstract state's shardings.

    Args:
      abstract: State of ShapeDtypeStructs with shardings, or a live state.
      step: of the checkpoint, such as that of `best`, with no other in its
        place; None is the newest.

    Returns:
      (state, host record), or None where there is no checkpoint at all.

    Raises:
      RestoreError: there are checkpoints but none can be read, or not that of
        `step`.
    """
    self.wait()
    template = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      _storable(abstract),
    )
    found = self.steps()
    if step is not None:
      if step not in found:
        raise RestoreError(
          f"checkpoint: no step {step} in {self.folder}, only {found}"
        )
      try:
        return self._load(step, template)
      except Exception as e:
        self._abandon()
        raise RestoreError(
          f"checkpoint: step {step} in {self.folder} cannot be read"
          f" ({type(e).__name__})"
        ) from e
    for step in reversed(found):
      try:
        return self._load(step, template)
      except Exception as e:  # pylint: disable=broad-exception-caught
        self._abandon()
        aside = self.folder.with_name(f"{self.folder.name}.unreadable-{step}")
        if jax.process_index() == 0:
          os.replace(self.folder / str(step), aside)
        barrier(f"aside-{step}")
        self._log(
          f"checkpoint: step {step} in {self.folder} cannot be read"
          f" ({type(e).__name__}), moved to {aside.name}; trying the one"
          " before it"
        )
    if found:
      raise RestoreError(
        f"checkpoint: none of the checkpoints {found} in {self.folder} can be"
        " read; remove the folder to start the stage again"
      )
    return None

  def _load(self, step: int, template: Any) -> tuple[State, dict[str, Any]]:
    loaded = self._open().load_checkpointables(
      step, {"state": template, "host": None}
    )
    return _state(loaded["state"]), _record(loaded["host"]["json"])

  def close(self) -> None:
    """Waits for the save in progress, then releases the folder.

    Raises:
      SaveError: that save has failed; as for `save`.
    """
    self.wait()
    checkpointer, self._checkpointer = self._checkpointer, None
    if checkpointer is not None:
      checkpointer.close()

  def _abandon(self) -> None:
    """Releases the folder after a failure, which `close` would raise again."""
    with contextlib.suppress(Exception):
      self.close()
