"""Checkpoints of a stage: Orbax v1, atomic, the data iterator in the commit."""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from distilljax.train.step import State


class SaveError(OSError):
  """A checkpoint could not be written; earlier ones are intact."""


class RestoreError(ValueError):
  """Checkpoints exist but none of them can be read."""


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


@contextlib.contextmanager
def _quiet():
  """Keeps the writers' tracebacks out of the log; the error says it."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(level)


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

  A save is atomic: Orbax writes beside and renames. A checkpoint that cannot be
  read is moved aside (never deleted) and the one before it is used.

  Args:
    folder: where the stage's checkpoints lie.
    keep: how many of the newest are kept.
    log: gets one line for everything a person should know.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    keep: int = 2,
    log: Callable[[str], None] = print,
  ):
    self.folder = pathlib.Path(folder).absolute()
    self._keep = keep
    self._log = log
    self._checkpointer = None

  def _open(self) -> ocp.training.Checkpointer:
    if self._checkpointer is None:
      policies = ocp.training.preservation_policies
      self._checkpointer = ocp.training.Checkpointer(
        self.folder,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(
          1
        ),
        preservation_policy=policies.LatestN(self._keep),
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

  def save(self, state: State, host: dict[str, Any]) -> int:
    """Writes state and host record (JSON values) in one commit.

    Returns:
      The step saved.

    Raises:
      SaveError: no space, no permission, ...: one line; older ones are intact.
    """
    step = int(state.step)
    if step in self.steps():
      return step
    try:
      with _quiet():
        saved = self._open().save_checkpointables(
          step,
          {"state": _storable(state), "host": {"json": _words(host)}},
        )
      if not saved or step not in self.steps():
        raise OSError("the checkpointer did not commit")
    except Exception as e:  # Orbax and its writers raise many kinds
      self._abandon()
      intact = self.steps()
      what = _reason(e)
      raise SaveError(
        f"checkpoint: step {step} could not be saved in {self.folder}"
        f" ({what}); last good checkpoint:"
        f" {f'step {intact[-1]}' if intact else 'none'}"
      ) from e
    return step

  def restore(self, abstract: State) -> tuple[State, dict[str, Any]] | None:
    """The newest readable checkpoint, in the abstract state's shardings.

    Args:
      abstract: State of ShapeDtypeStructs with shardings, or a live state.

    Returns:
      (state, host record), or None where there is no checkpoint at all.

    Raises:
      RestoreError: there are checkpoints but none can be read.
    """
    template = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      _storable(abstract),
    )
    found = self.steps()
    for step in reversed(found):
      try:
        loaded = self._open().load_checkpointables(
          step, {"state": template, "host": None}
        )
        return _state(loaded["state"]), _record(loaded["host"]["json"])
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

  def close(self) -> None:
    """Releases the folder."""
    checkpointer, self._checkpointer = self._checkpointer, None
    if checkpointer is not None:
      checkpointer.close()

  def _abandon(self) -> None:
    """Releases the folder after a failure, which `close` would raise again."""
    with _quiet(), contextlib.suppress(Exception):
      self.close()
