"""Batches: coverage, order, exact state, processes, augmentation, sources."""

import threading

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from distilljax import data
from distilljax.data import iterator as iterator_module
from tests.helpers import one_line_error


def _rows(iterator, batches, key="x"):
  return np.concatenate([next(iterator)[key] for _ in range(batches)])


@hypothesis.given(
    n=st.integers(4, 23),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 5),
    skip=st.integers(0, 9),
)
def test_every_row_comes_once_an_epoch_and_the_state_is_exact(
    n, batch_size, seed, skip
):
  arrays = {"x": np.arange(n), "y": np.arange(n) ** 2}
  make = lambda: data.make_iterator(arrays, batch_size, seed=seed)
  iterator = make()
  rows = _rows(iterator, -(-3 * n // batch_size))
  for epoch in range(3):
    part = rows[epoch * n : (epoch + 1) * n]
    assert sorted(part) == list(range(n))
  iterator = make()
  for _ in range(skip):
    next(iterator)
  state = iterator.get_state()
  ahead = [next(iterator) for _ in range(5)]
  other = make()
  other.set_state(state)
  for batch in ahead:
    again = next(other)
    np.testing.assert_array_equal(again["x"], batch["x"])
    np.testing.assert_array_equal(again["y"], batch["x"] ** 2)
  assert other.get_state() == iterator.get_state()
  iterator.set_state(state)  # backwards, on the used one
  np.testing.assert_array_equal(next(iterator)["x"], ahead[0]["x"])


def test_epochs_and_seeds_differ_and_unshuffled_is_in_order():
  arrays = {"x": np.arange(50)}
  rows = _rows(data.make_iterator(arrays, 10, seed=0), 15)
  epochs = [tuple(rows[i : i + 50]) for i in (0, 50, 100)]
  other = tuple(_rows(data.make_iterator(arrays, 10, seed=1), 5))
  assert len({*epochs, other, tuple(range(50))}) == 5
  plain = data.make_iterator(arrays, 20, seed=0, shuffle=False)
  np.testing.assert_array_equal(_rows(plain, 6), np.arange(120) % 50)


def test_order_is_uniform():
  # Row 0 lands at each of 4 places equally often: 4000 epochs, 5 sigma.
  rows = _rows(data.make_iterator({"x": np.arange(4)}, 4, seed=0), 4000)
  counts = np.bincount(np.flatnonzero(rows == 0) % 4, minlength=4)
  assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 3 / 4)


def test_iterating_keeps_dtypes_and_other_axes():
  arrays = {
      "x": np.zeros((5, 2, 3), np.float32),
      "label": np.arange(5, dtype=np.int32),
  }
  iterator = data.make_iterator(arrays, 5, seed=0)
  assert iter(iterator) is iterator and iterator.batch_size == 5
  assert iterator.position == 0
  batch = next(iterator)
  assert iterator.position == 1
  assert batch["x"].shape == (5, 2, 3) and batch["x"].dtype == np.float32
  assert batch["label"].dtype == np.int32
  batch["label"][:] = -1  # a batch is a copy: the source stays as it was
  assert sorted(next(iterator)["label"]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("augment", (None, {"flip": True, "shift": 1}))
def test_processes_share_a_batch_whatever_their_number(augment):
  x = np.random.default_rng(0).normal(size=(30, 4, 4, 1)).astype(np.float32)
  make = lambda i, n: data.make_iterator(
      {"x": x}, 8, seed=3, augment=augment, process_index=i, process_count=n
  )
  whole, halves = make(0, 1), [make(i, 2) for i in range(2)]
  for _ in range(6):
    parts = [next(half)["x"] for half in halves]
    assert all(len(part) == 4 for part in parts)
    np.testing.assert_array_equal(next(whole)["x"], np.concatenate(parts))
  assert whole.get_state() == halves[0].get_state() == halves[1].get_state()
  quarter = make(3, 4)
  quarter.set_state(whole.get_state())
  np.testing.assert_array_equal(next(quarter)["x"], next(whole)["x"][6:])


# Augmentation.


def _moved(image, flip, down, right):
  """One pixel at a time: the place that a pixel of the result comes from."""
  h, w, _ = image.shape
  image = image[:, ::-1] if flip else image
  out = np.empty_like(image)
  for y in range(h):
    for x in range(w):
      out[y, x] = image[
          min(max(y - down, 0), h - 1), min(max(x - right, 0), w - 1)
      ]
  return out


@pytest.mark.parametrize(
    "augment, flips, shifts",
    (
        ({"flip": True}, (False, True), (0,)),
        ({"shift": 2}, (False,), (-2, -1, 0, 1, 2)),
        ({"flip": True, "shift": 1}, (False, True), (-1, 0, 1)),
    ),
)
def test_augmentation_draws_every_move_equally_often(augment, flips, shifts):
  image = np.random.default_rng(0).normal(size=(5, 6, 2)).astype(np.float32)
  arrays = {"x": image[None].repeat(100, 0), "label": np.arange(100)}
  iterator = data.make_iterator(arrays, 100, seed=1, augment=augment)
  options = [(f, d, r) for f in flips for d in shifts for r in shifts]
  known = {_moved(image, *o).tobytes(): i for i, o in enumerate(options)}
  assert len(known) == len(options)
  counts, seen = np.zeros(len(options)), []
  for _ in range(40):
    batch = next(iterator)
    assert sorted(batch["label"]) == list(range(100))
    drawn = [known[row.tobytes()] for row in batch["x"]]
    seen.append(tuple(drawn))
    counts += np.bincount(drawn, minlength=len(options))
  p = 1 / len(options)
  assert np.abs(counts - 4000 * p).max() < 5 * np.sqrt(4000 * p * (1 - p))
  assert len(set(seen)) == 40  # a batch number draws anew
  assert arrays["x"].shape == (100, 5, 6, 2)


def test_a_shift_goes_down_and_right():
  x = np.random.default_rng(0).normal(size=(3, 5, 6, 1))
  moves = [(False, 1, 2), (True, -2, 1), (True, 0, -1)]
  flips, down, right = (np.asarray(a) for a in zip(*moves))
  out = iterator_module._augmented(x, flips, np.stack([down, right], 1))
  for image, row, move in zip(x, out, moves):
    np.testing.assert_array_equal(row, _moved(image, *move))


def test_augmentation_is_part_of_the_state_and_of_the_seed():
  x = np.random.default_rng(0).normal(size=(9, 4, 4, 1))
  make = lambda seed: data.make_iterator(
      {"x": x}, 4, seed=seed, augment={"flip": True, "shift": 1}, shuffle=False
  )
  iterator, other = make(0), make(0)
  for _ in range(7):
    next(iterator)
  other.set_state(iterator.get_state())
  a, b = next(iterator)["x"], next(other)["x"]
  np.testing.assert_array_equal(a, b)
  different = make(1)
  for _ in range(7):
    next(different)
  assert not np.array_equal(next(different)["x"], a)


def test_an_augmentation_that_does_nothing_is_none():
  x = np.random.default_rng(0).normal(size=(8, 4, 4, 1))
  plain = data.make_iterator({"x": x}, 4, seed=0)
  still = data.make_iterator(
      {"x": x}, 4, seed=0, augment={"flip": False, "shift": 0}
  )
  for _ in range(3):
    np.testing.assert_array_equal(next(plain)["x"], next(still)["x"])
  data.make_iterator({"y": np.arange(4)}, 4, seed=0, augment={})


# Arrays in a file.


def test_arrays_in_a_file_are_not_loaded(tmp_path):
  np.save(tmp_path / "tokens.npy", np.zeros(30, np.int32))
  tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r").reshape(10, 3)
  iterator = data.make_iterator({"tokens": tokens}, 5, seed=0)
  assert not next(iterator)["tokens"].any()
  np.load(tmp_path / "tokens.npy", mmap_mode="r+")[:] = 7
  np.testing.assert_array_equal(next(iterator)["tokens"], np.full((5, 3), 7))


# Sources that are read while the training goes on.


class Rows:
  """Rows of arrays one by one; `before(i)` is called first."""

  def __init__(self, arrays, before=lambda i: None):
    self.arrays, self.before = arrays, before

  def __len__(self):
    return len(self.arrays["x"])

  def __getitem__(self, i):
    self.before(i)
    return {k: a[i] for k, a in self.arrays.items()}


def _images(n=13):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(n, 4, 4, 1)).astype(np.float32)
  return {"x": x, "label": np.arange(n, dtype=np.int32)}


@pytest.mark.parametrize(
    "options",
    ({}, {"augment": {"flip": True, "shift": 1}}, {"shuffle": False}),
)
def test_a_source_gives_the_batches_of_its_rows_in_memory(options):
  arrays = _images()
  memory = data.make_iterator(arrays, 4, seed=3, **options)
  source = data.source_iterator(Rows(arrays), 4, seed=3, **options)
  half = data.source_iterator(
      Rows(arrays), 4, seed=3, process_index=1, process_count=2, **options
  )
  assert source.batch_size == 4
  for i in range(10):
    if i == 5:
      state = memory.get_state()
    assert source.position == i and source.get_state() == memory.get_state()
    want, got, part = next(memory), next(source), next(half)
    for key in arrays:
      np.testing.assert_array_equal(got[key], want[key])
      np.testing.assert_array_equal(part[key], want[key][2:])
      assert got[key].dtype == want[key].dtype
  for iterator in (memory, source):  # one's state is the other's
    iterator.set_state(state)
  np.testing.assert_array_equal(next(source)["x"], next(memory)["x"])
  np.testing.assert_array_equal(next(source)["x"], next(memory)["x"])


def test_a_source_is_read_ahead_by_as_many_threads():
  begun, go = [], threading.Event()

  def before(i):
    begun.append(i)
    assert go.wait(30)

  arrays = {"x": np.arange(40)}
  source = data.source_iterator(
      Rows(arrays, before), 4, seed=0, shuffle=False, threads=3
  )
  assert begun == []  # nothing before it is asked for
  first = threading.Thread(target=lambda: begun.append(next(source)["x"]))
  first.start()
  while len(begun) < 3:
    pass
  assert sorted(begun) == [0, 4, 8]
  go.set()
  first.join()
  assert source.position == 1
  np.testing.assert_array_equal(next(source)["x"], [4, 5, 6, 7])


def test_a_source_that_reads_many_rows_at_once_is_asked_once_a_batch():
  asked = []

  class Many(Rows):
    def __getitems__(self, ids):
      asked.append(ids)
      return [Rows.__getitem__(self, i) for i in ids]

    def __getitem__(self, i):
      raise AssertionError("one by one")

  source = data.source_iterator(
      Many({"x": np.arange(8)}),
      4,
      seed=0,
      shuffle=False,
      transform=lambda row: {"y": row["x"] ** 2},
  )
  np.testing.assert_array_equal(next(source)["y"], [0, 1, 4, 9])
  assert [0, 1, 2, 3] in asked and all(len(ids) == 4 for ids in asked)


def test_a_stalled_source_is_an_error_with_its_name():
  gates = {i: threading.Event() for i in range(4)}
  waiting = iter(gates.values())

  def before(i):
    if i == 5:  # the first row of the second batch
      assert next(waiting).wait(60)

  source = data.source_iterator(
      Rows({"x": np.arange(20)}, before),
      5,
      seed=0,
      shuffle=False,
      name="far/train",
      threads=2,
      stall_seconds=0.2,
  )
  stalled = one_line_error(
      r"far/train: the source gave no batch 1 within 0.2 s", data.StalledSource
  )
  try:
    np.testing.assert_array_equal(next(source)["x"], np.arange(5))
    state = source.get_state()
    with stalled:
      next(source)
    assert source.get_state() == state and source.position == 1
    # It is read anew; that the old reader comes back says nothing about that.
    source.set_state(state)
    gates[0].set()
    with one_line_error("no batch 1 within", data.StalledSource):
      next(source)
    gates[1].set()  # late, but not lost
    for i in (1, 2):
      np.testing.assert_array_equal(next(source)["x"], np.arange(5) + 5 * i)
  finally:
    for gate in gates.values():
      gate.set()


def test_a_short_or_broken_source_is_an_error_with_its_name():
  class Short(Rows):
    def __len__(self):
      return 20

  class Few(Rows):
    def __getitems__(self, ids):
      return [self[i] for i in ids[1:]]

  def ragged(row):
    return {"x": np.zeros(2 if row["x"] == 2 else 1)}

  arrays = {"x": np.arange(10)}
  for source, options, message in (
      (Short(arrays), {}, r"rows \[8, 9, 10, 11\]\.\.\. of 20 cannot be read"
       r" \(IndexError: index 10 is out of bounds"),
      (Few(arrays), {}, r"of 10 cannot be read \(ValueError: 3 rows came\)"),
      (Rows(arrays), {"transform": ragged}, r"row 2 must be of the shapes"
       r" {'x': \(1,\)} of row 0, got {'x': \(2,\)}"),
      (Rows(arrays), {"transform": lambda row: 1 / 0},
       r"rows .* cannot be read \(ZeroDivisionError: division by zero\)"),
  ):
    iterator = data.source_iterator(
        source, 4, seed=0, shuffle=False, name="far/train", **options
    )
    with one_line_error(f"far/train: .*{message}"):
      for _ in range(3):
        next(iterator)
  one = data.source_iterator(
      Rows(arrays), 1, seed=0, shuffle=False, transform=lambda row: row["x"]
  )
  with one_line_error("source: row 0 of 10 cannot be read .TypeError"):
    next(one)


# Row numbers.


def test_row_iterator_counts_rows_over_all_processes():
  iterator = data.row_iterator(4)
  first = next(iterator)
  assert set(first) == {"index"} and first["index"].dtype == np.int32
  np.testing.assert_array_equal(first["index"], [0, 1, 2, 3])
  state = iterator.get_state()
  np.testing.assert_array_equal(next(iterator)["index"], [4, 5, 6, 7])
  other = data.row_iterator(4, process_index=1, process_count=2)
  other.set_state(state)
  np.testing.assert_array_equal(next(other)["index"], [6, 7])


def test_row_numbers_start_again_rather_than_overflow():
  iterator = data.row_iterator(4)
  state = iterator.get_state().replace(
      b'"position": 0', b'"position": %d' % (2**29 - 1)
  )
  iterator.set_state(state)
  np.testing.assert_array_equal(
      next(iterator)["index"], np.arange(2**31 - 4, 2**31)
  )
  np.testing.assert_array_equal(next(iterator)["index"], [0, 1, 2, 3])


# Bad input.


def test_states_of_others_are_refused():
  make = lambda n=10, b=4, seed=0, **more: data.make_iterator(
      {"x": np.zeros((n, 4, 4, 1))}, b, seed=seed, **more
  )
  state = make().get_state()
  for other, message in (
      (make(n=11), "rows of the state must be 11 as here, got 10"),
      (make(b=5), "batch_size of the state must be 5 as here, got 4"),
      (make(seed=1), "seed of the state must be 1 as here, got 0"),
      (make(shuffle=False), "shuffle of the state must be False as here"),
      (make(augment={"flip": True}), "flip of the state must be True as here"),
      (make(augment={"shift": 1}), "shift of the state must be 1 as here"),
      (data.row_iterator(4), "flip of the state must be None as here"),
  ):
    with one_line_error(f"set_state: {message}"):
      other.set_state(state)
    assert other.position == 0
  for broken in (b"", b"\xff\xfe", b"[1]", b"{}", b'{"position": "x"}', b"3"):
    with one_line_error("set_state: state must be bytes from get_state, got"):
      make().set_state(broken)


def test_impossible_iterators_are_one_line():
  x = {"x": np.zeros((10, 4, 4, 1))}
  make = lambda arrays=x, b=4, seed=0, **more: data.make_iterator(
      arrays, b, seed=seed, **more
  )
  for run, message in (
      (
          lambda: make(b=11, name="digits/train"),
          "digits/train must be at least batch_size=11 rows, got 10 rows",
      ),
      (
          lambda: make({"x": np.zeros(10), "label": np.zeros(9)}, name="d"),
          r"d\['label'\] must be \[n, \.\.\.\] with as many rows as 'x', got",
      ),
      (lambda: make({"x": np.zeros(())}), r"arrays\['x'\] must be .*got \[\]"),
      (lambda: make({}), "arrays must be a dict of arrays, got an empty one"),
      (lambda: make(b=0), "batch_size must be >= 1, got 0"),
      (lambda: make(b=2.0), "batch_size must be an integer, got 2.0"),
      (lambda: make(b=True), "batch_size must be an integer, got True"),
      (lambda: make(seed=-1), "seed must be >= 0, got -1"),
      (
          lambda: make(process_count=3),
          "batch_size must be a multiple of process_count=3, got 4",
      ),
      (lambda: make(process_count=0), "process_count must be >= 1, got 0"),
      (lambda: make(process_index=-1), "process_index must be >= 0, got -1"),
      (
          lambda: make(process_index=2, process_count=2),
          "process_index must be < process_count=2, got 2",
      ),
      (
          lambda: make(augment={"filp": True}),
          "augment must be one of 'flip', 'shift', got 'filp'; did you mean",
      ),
      (lambda: make(augment={"flip": 1}), r"augment\['flip'\] must be a bool"),
      (
          lambda: make(augment={"shift": -1}),
          r"augment\['shift'\] must be >= 0, got -1",
      ),
      (
          lambda: make(augment={"shift": 4}),
          r"augment\['shift'\] must be < 4, got 4",
      ),
      (
          lambda: make({"x": np.zeros((10, 2))}, augment={"flip": True}),
          r"augment must be None without images 'x' \[n, h, w, c\]",
      ),
      (
          lambda: make({"y": np.zeros(10)}, augment={"shift": 1}),
          "augment must be None without images 'x'",
      ),
  ):
    with one_line_error(f"make_iterator: {message}"):
      run()
  make(b=10)
  make(augment={"shift": 3})
  rows = [{"x": np.zeros((4, 4))}] * 10
  make = lambda b=4, seed=0, **more: data.source_iterator(
      rows, b, seed=seed, **more
  )
  for run, message in (
      (
          lambda: make(b=11, name="far/train"),
          "far/train must be at least batch_size=11 rows, got 10 rows",
      ),
      (lambda: make(seed=-1), "seed must be >= 0, got -1"),
      (lambda: make(threads=0), "threads must be >= 1, got 0"),
      (lambda: make(stall_seconds=0), "stall_seconds must be > 0, got 0"),
      (lambda: make(process_count=3), "batch_size must be a multiple of"),
      (lambda: make(augment={"flip": 1}), r"augment\['flip'\] must be a bool"),
      (
          lambda: next(make(augment={"flip": True})),
          "augment must be None without images 'x'",
      ),
  ):
    with one_line_error(f"source_iterator: {message}"):
      run()
  with one_line_error("row_iterator: batch_size must be a multiple of"):
    data.row_iterator(4, process_count=3)
