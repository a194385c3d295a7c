"""Endless batches with an exact state, on grain.

An item of the source is a whole batch: looking rows up one by one and stacking
them in Python costs more than a small train step. A batch is a function of its
number alone (and of the seed), so the state is that number, and rows in memory
come in the same order as rows that are read while the training goes on.
"""

import functools
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import numpy as np

from distilljax import _checks

# grain wants a length; no run draws this many batches.
_ENDLESS = 2**62
# Names of the random streams, so that none is another one's.
_ORDER, _AUGMENT = 0, 1


class StalledSource(TimeoutError):
  """A source gave nothing for too long; its reader may still be waiting."""


def _generator(*words: int) -> np.random.Generator:
  return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


class _Batches:
  """Random access to batch number i: `read(i)`."""

  def __init__(self, read: Callable[[int], dict[str, np.ndarray]]):
    self._read = read

  def __len__(self):
    return _ENDLESS

  def __getitem__(self, index):
    return self._read(int(index))


class _ReadAhead(_Batches):
  """Batches that threads read: says whether one has come (or has failed)."""

  def __init__(self, read: Callable[[int], dict[str, np.ndarray]]):
    super().__init__(read)
    self._changed = threading.Condition()
    self.forget()

  def forget(self) -> None:
    """What is being read now will not count."""
    self._come = set()

  def __getitem__(self, index):
    come = self._come
    try:
      return super().__getitem__(index)
    finally:
      with self._changed:
        come.add(int(index))
        self._changed.notify_all()

  def wait(self, index: int, seconds: float) -> bool:
    """Waits for a batch; False where it has not come in time."""
    with self._changed:
      come = self._changed.wait_for(lambda: index in self._come, seconds)
      self._come.discard(index)
    return come


class BatchIterator:
  """Endless iterator over dicts of NumPy arrays, with an exact state.

  Attributes:
    batch_size: rows of a batch over all processes.
  """

  def __init__(
      self,
      read: Callable[[int], dict[str, np.ndarray]],
      *,
      batch_size: int,
      identity: dict[str, Any],
      threads: int = 0,
      stall_seconds: float = 0,
      name: str = "",
  ):
    self.batch_size = batch_size
    self._identity = identity
    self._name = name
    self._seconds = stall_seconds
    # No threads where a batch costs less than handing it over would.
    self._ahead = _ReadAhead(read) if threads else None
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=threads
    )
    dataset = grain.MapDataset.source(self._ahead or _Batches(read))
    self._iterator = iter(dataset.to_iter_dataset(options))

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if self._ahead is not None:
      self._iterator.start_prefetch()
      if not self._ahead.wait(self.position, self._seconds):
        raise StalledSource(
            f"{self._name}: the source gave no batch {self.position} within"
            f" {self._seconds:g} s"
        )
    return next(self._iterator)

  @property
  def position(self) -> int:
    """Number of the next batch, from 0."""
    return int(self._iterator.get_state()["next_index"])

  def get_state(self) -> bytes:
    """The state: the next batch's number, and whose it is.

    It is the same on every process and does not depend on their number.
    """
    state = {"position": self.position, **self._identity}
    return json.dumps(state, sort_keys=True).encode()

  def set_state(self, state: bytes) -> None:
    """Continues exactly where `get_state` was called.

    Args:
      state: what `get_state` returned, of an iterator made with the same
        arguments (the number of processes may differ).

    Raises:
      ValueError: not such a state, or of an iterator over other rows, of
        another batch size or another seed.
    """
    try:
      saved = json.loads(bytes(state))
      position = int(saved.pop("position"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(
          "set_state: state must be bytes from get_state, got"
          f" {bytes(state)[:40]!r}"
      ) from error
    for name in sorted(self._identity.keys() | saved.keys()):
      mine, theirs = self._identity.get(name), saved.get(name)
      if mine != theirs:
        _checks.fail(
            "set_state", f"{name} of the state", f"{mine!r} as here", theirs
        )
    if self._ahead is not None:
      self._ahead.forget()
    self._iterator.set_state({"next_index": position})


def _integer(fn: str, name: str, value: Any, low: int) -> None:
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    _checks.fail(fn, name, "an integer", repr(value))
  if value < low:
    _checks.fail(fn, name, f">= {low}", value)


def _local(
    fn: str, batch_size: int, process_index: int, process_count: int
) -> slice:
  """The rows of a batch that are this process's."""
  _integer(fn, "batch_size", batch_size, 1)
  _integer(fn, "process_count", process_count, 1)
  _integer(fn, "process_index", process_index, 0)
  if process_index >= process_count:
    _checks.fail(
        fn, "process_index", f"< process_count={process_count}", process_index
    )
  if batch_size % process_count:
    _checks.fail(
        fn,
        "batch_size",
        f"a multiple of process_count={process_count}",
        batch_size,
    )
  rows = batch_size // process_count
  return slice(process_index * rows, (process_index + 1) * rows)


def _checked_augment(fn, augment):
  """(flip, shift) of the option `augment`."""
  options = dict(augment or {})
  for name in options:
    _checks.one_of(fn, "augment", name, ("flip", "shift"))
  flip, shift = options.get("flip", False), options.get("shift", 0)
  if not isinstance(flip, (bool, np.bool_)):
    _checks.fail(fn, "augment['flip']", "a bool", repr(flip))
  _integer(fn, "augment['shift']", shift, 0)
  return bool(flip), int(shift)


def _check_images(fn, arrays, flip, shift):
  """Whether there is something to mirror and to move."""
  if flip or shift:
    if "x" not in arrays or np.ndim(arrays["x"]) != 4:
      _checks.fail(
          fn,
          "augment",
          "None without images 'x' [n, h, w, c]",
          {"flip": flip, "shift": shift},
      )
    size = min(arrays["x"].shape[1:3])
    if shift >= size:
      _checks.fail(fn, "augment['shift']", f"< {size}", shift)


def _augmented(x, flips, shifts):
  """Mirrors where `flips`, then moves by `shifts`, repeating the border.

  Args:
    x: images [b, h, w, c].
    flips: bool [b], mirror left and right.
    shifts: int [b, 2], pixels down and to the right.

  Returns:
    Images [b, h, w, c].
  """
  _, h, w, _ = x.shape
  rows = np.clip(np.arange(h)[None] - shifts[:, :1], 0, h - 1)
  columns = np.clip(np.arange(w)[None] - shifts[:, 1:], 0, w - 1)
  columns = np.where(flips[:, None], w - 1 - columns, columns)
  batch = np.arange(len(x))[:, None, None]
  return x[batch, rows[:, :, None], columns[:, None, :]]


def make_iterator(
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    *,
    seed: int,
    shuffle: bool = True,
    augment: Mapping[str, Any] | None = None,
    name: str = "arrays",
    process_index: int | None = None,
    process_count: int | None = None,
) -> BatchIterator:
  """Endless batches of rows of arrays in memory.

  The stream of rows is epoch after epoch, each in an order drawn from (seed,
  epoch), cut into batches: every row comes exactly once an epoch, and a batch
  may begin in one epoch and end in the next. Augmentation draws from (seed,
  batch number). So batch i is a function of (arrays, seed, i): the state is i,
  resuming is exact, and what all processes get together does not depend on
  their number.

  Args:
    arrays: arrays with a common first axis, e.g. {"x", "label"}.
    batch_size: rows of a batch over all processes.
    seed: of order and augmentation, >= 0.
    shuffle: False keeps the rows' order in every epoch.
    augment: None, or plain values {"flip": bool, "shift": int} for the images
      "x" [n, h, w, c]: mirror left and right with probability 1/2; move by up
      to `shift` pixels each way, the border repeated.
    name: what errors call the source, e.g. "digits/train".
    process_index: which process this is; None asks JAX.
    process_count: how many there are, None asks JAX; each gets its consecutive
      rows of every batch, batch_size / process_count of them.

  Returns:
    A `BatchIterator` of dicts with the keys of `arrays`.

  Raises:
    ValueError: fewer rows than a batch, arrays of different lengths, a batch
      size that the processes do not divide, or an impossible option.

  Example:
    >>> iterator = make_iterator({"x": np.arange(10)}, 4, seed=0)
    >>> state = iterator.get_state()
    >>> first = next(iterator)["x"]
    >>> iterator.set_state(state)
    >>> bool((next(iterator)["x"] == first).all())
    True
  """
  fn = "make_iterator"
  if not arrays:
    _checks.fail(fn, name, "a dict of arrays", "an empty one")
  arrays = {k: np.asarray(a) for k, a in arrays.items()}
  first = next(iter(arrays))
  for key, array in arrays.items():
    if array.ndim == 0 or len(array) != len(arrays[first]):
      _checks.fail(
          fn,
          f"{name}[{key!r}]",
          f"[n, ...] with as many rows as {first!r}",
          list(array.shape),
      )
  flip, shift = _checked_augment(fn, augment)
  _check_images(fn, arrays, flip, shift)
  return _shuffled(
      fn,
      lambda ids: {k: a[ids] for k, a in arrays.items()},
      len(arrays[first]),
      batch_size,
      seed=seed,
      shuffle=shuffle,
      flip=flip,
      shift=shift,
      name=name,
      process_index=process_index,
      process_count=process_count,
  )


def source_iterator(
    source: Any,
    batch_size: int,
    *,
    seed: int,
    shuffle: bool = True,
    augment: Mapping[str, Any] | None = None,
    transform: Callable[[Any], Mapping[str, Any]] | None = None,
    name: str = "source",
    threads: int = 4,
    stall_seconds: float = 600.0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> BatchIterator:
  """Endless batches of rows that are read while the training goes on.

  For sets that do not fit into memory: anything with a length and random
  access, such as `tfds_source`, the data sources of grain, or a class of one's
  own. The batches are those of `make_iterator` over the same rows, seed and
  options, in the same order and with the same state; they are read by threads
  of grain, each a batch, ahead of the one that is needed. The order takes 8
  bytes a row.

  A source that stalls is an error with its name. A reader that never returns is
  left behind, and Python waits for it when the program ends; the launchers do
  not.

  Args:
    source: `len(source)` rows, `source[i]` for i in [0, len(source)), from any
      thread. Where there is a `source.__getitems__(ids)`, rows are read by it.
    batch_size: rows of a batch over all processes.
    seed: of order and augmentation, >= 0.
    shuffle: False keeps the rows' order in every epoch.
    augment: as for `make_iterator`.
    transform: row -> dict of numbers and arrays, each of one shape for all rows
      (a function of the row alone); None where rows are such dicts.
    name: what errors call the source, e.g. "imagenet/train".
    threads: batches that are read at the same time and held ahead, >= 1.
    stall_seconds: how long a batch is waited for.
    process_index: which process this is; None asks JAX.
    process_count: how many there are, None asks JAX; each reads its consecutive
      rows of every batch.

  Returns:
    A `BatchIterator`. Its `__next__` raises `StalledSource` when a batch does
    not come in time, and ValueError for a row that cannot be read or does not
    fit the others.

  Raises:
    ValueError: fewer rows than a batch, a batch size that the processes do not
      divide, or an impossible option.

  Example:
    >>> rows = [{"x": np.float32(i)} for i in range(10)]
    >>> iterator = source_iterator(rows, 4, seed=0)
    >>> next(iterator)["x"].shape
    (4,)
  """
  fn = "source_iterator"
  _integer(fn, "threads", threads, 1)
  if not stall_seconds > 0:
    _checks.fail(fn, "stall_seconds", "> 0", stall_seconds)
  flip, shift = _checked_augment(fn, augment)
  read_all = getattr(source, "__getitems__", None) or (
      lambda ids: [source[i] for i in ids]
  )

  def unreadable(ids, error):
    what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    where = f"rows {ids[:4]}..." if len(ids) > 1 else f"row {ids[0]}"
    return ValueError(
        f"{name}: {where} of {len(source)} cannot be read ({what})"
    )

  def read(ids):
    ids = ids.tolist()
    try:
      rows = read_all(ids)
      rows = [dict(transform(r) if transform else r) for r in rows]
      if len(rows) != len(ids):
        raise ValueError(f"{len(rows)} rows came")
    except Exception as error:
      raise unreadable(ids, error) from error
    for i, row in zip(ids, rows):
      shapes = {k: np.shape(v) for k, v in row.items()}
      wanted = {k: np.shape(v) for k, v in rows[0].items()}
      if shapes != wanted:
        raise ValueError(
            f"{name}: row {i} must be of the shapes {wanted} of row {ids[0]},"
            f" got {shapes}"
        )
    batch = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    _check_images(fn, batch, flip, shift)
    return batch

  return _shuffled(
      fn,
      read,
      len(source),
      batch_size,
      seed=seed,
      shuffle=shuffle,
      flip=flip,
      shift=shift,
      name=name,
      process_index=process_index,
      process_count=process_count,
      threads=threads,
      stall_seconds=stall_seconds,
  )


def _shuffled(
    fn,
    rows_of,
    n,
    batch_size,
    *,
    seed,
    shuffle,
    flip,
    shift,
    name,
    process_index,
    process_count,
    **reading,
) -> BatchIterator:
  """Batches of n rows, which `rows_of(ids)` gives as a dict of arrays."""
  if process_index is None:
    process_index = jax.process_index()
  if process_count is None:
    process_count = jax.process_count()
  mine = _local(fn, batch_size, process_index, process_count)
  _integer(fn, "seed", seed, 0)
  if n < batch_size:
    _checks.fail(
        fn, name, f"at least batch_size={batch_size} rows", f"{n} rows"
    )

  # A batch reads two epochs at most; more would only fill memory.
  @functools.lru_cache(maxsize=2)
  def order(epoch):
    return _generator(seed, epoch, _ORDER).permutation(n)

  def read(index):
    start = index * batch_size
    positions = np.arange(start, start + batch_size)
    if shuffle:
      epochs = positions // n
      rows = positions % n
      ids = np.concatenate([
          order(int(e))[rows[epochs == e]]
          for e in range(int(epochs[0]), int(epochs[-1]) + 1)
      ])
    else:
      ids = positions % n
    batch = rows_of(ids[mine])
    if flip or shift:
      generator = _generator(seed, index, _AUGMENT)
      # Drawn for the whole batch: a process takes its part, whatever their
      # number.
      flips = generator.random(batch_size) < (0.5 if flip else 0.0)
      shifts = generator.integers(-shift, shift + 1, (batch_size, 2))
      batch["x"] = _augmented(batch["x"], flips[mine], shifts[mine])
    return batch

  identity = {
      "batch_size": int(batch_size),
      "rows": n,
      "seed": int(seed),
      "shuffle": bool(shuffle),
      "flip": flip,
      "shift": shift,
  }
  return BatchIterator(
      read,
      batch_size=int(batch_size),
      identity=identity,
      name=name,
      **reading,
  )


def row_iterator(
    batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> BatchIterator:
  """Endless row numbers, for jobs that need no data (a closed-form teacher).

  Batch i holds i * batch_size, i * batch_size + 1, ..., counted over all
  processes; the numbers start again at 0 after 2**31.

  Args:
    batch_size: rows of a batch over all processes.
    process_index: which process this is.
    process_count: how many there are.

  Returns:
    A `BatchIterator` of {"index": int32 [batch_size / process_count]}.

  Raises:
    ValueError: a batch size that the processes do not divide.
  """
  mine = _local("row_iterator", batch_size, process_index, process_count)

  def read(index):
    numbers = index * batch_size + np.arange(batch_size)[mine]
    return {"index": (numbers % 2**31).astype(np.int32)}

  return BatchIterator(
      read,
      batch_size=int(batch_size),
      identity={"batch_size": int(batch_size)},
  )
