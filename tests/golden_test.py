"""Reproduces numbers recorded from the papers' official code.

`DISTILLJAX_GOLDEN` names the folder of `<set>.npz` files (default:
`tests/golden`). For each file the reader `tests/golden_readers/<set>.py` calls
the library's public functions as a user would; every key of the file is an
input the reader read, an output it reproduced, or matches a pattern that the
reader lists as not reproduced, with a reason. Anything else fails, and so does
a file without a reader.

A reader holds
  CALLS: {regex of output keys: the public call that gives them},
  NOT_REPRODUCED: {regex: reason},
  TOLERANCE: {regex: (tolerance, reason)} where the default does not hold,
  OPTIMISED = True where the quick suite's unoptimised compiles will not do,
  reproduce(golden) -> {key: value}.

`python -m tests.golden_test` rewrites the table in tests/golden/README.md.
"""

import importlib.util
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
FOLDER = pathlib.Path(os.environ.get("DISTILLJAX_GOLDEN", HERE / "golden"))
VALUE_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 2e-4
ALL_ZERO_TOLERANCE = 1e-6
FLOAT32_FACTOR = 10


class Golden:
  """One recorded file: a mapping that remembers which keys were read."""

  def __init__(self, path: pathlib.Path, dtype: Any):
    with np.load(path, allow_pickle=False) as data:
      self._data = {k: data[k] for k in data.files}
    self._dtype = dtype
    self.read: set[str] = set()

  def keys(self) -> list[str]:
    """All keys of the file, in its order."""
    return list(self._data)

  def __contains__(self, key: str) -> bool:
    return key in self._data

  def __getitem__(self, key: str) -> jax.Array:
    """An input array: floats in the dtype of this pass."""
    self.read.add(key)
    value = self._data[key]
    if np.issubdtype(value.dtype, np.floating):
      value = value.astype(self._dtype)
    return jnp.asarray(value)

  def number(self, key: str, default: Any = None) -> Any:
    """A hyper-parameter as a Python number, bool or string."""
    if default is not None and key not in self._data:
      return default
    self.read.add(key)
    return self._data[key].item()

  def theirs(self, key: str) -> np.ndarray:
    """The recorded value, for the comparison (does not count as read)."""
    return self._data[key]

  def match(self, pattern: str) -> Iterator[re.Match[str]]:
    """Full matches of `pattern` over the keys: how a reader finds cases."""
    for key in self._data:
      if found := re.fullmatch(pattern, key):
        yield found

  def cases(self, pattern: str = r"(c\d+)_.*") -> list[str]:
    """The distinct first groups of `pattern`, in file order."""
    return list(dict.fromkeys(m.group(1) for m in self.match(pattern)))

  def inputs(self, prefix: str, names: str = r".*") -> dict[str, jax.Array]:
    """{name: array} for the keys `<prefix><name>` with `name` as given."""
    pattern = re.escape(prefix) + f"({names})"
    return {m.group(1): self[m.group(0)] for m in self.match(pattern)}


def reader_of(name: str):
  """The reader module of a set, or None."""
  full = f"tests.golden_readers.{name}"
  if importlib.util.find_spec(full) is None:
    return None
  return importlib.import_module(full)


def lookup(table: dict[str, Any], key: str) -> Any:
  """The entry of the first pattern that matches the whole key, or None."""
  for pattern, entry in table.items():
    if re.fullmatch(pattern, key):
      return entry
  return None


def tolerance(reader: Any, key: str) -> float:
  """The bound on max|ours - theirs| / max|theirs| for a key."""
  if wider := lookup(getattr(reader, "TOLERANCE", {}), key):
    return wider[0]
  return GRADIENT_TOLERANCE if "grad" in key else VALUE_TOLERANCE


def difference(ours: Any, theirs: np.ndarray) -> tuple[float, bool]:
  """Largest error relative to the largest value; True: theirs is all zero."""
  ours = np.asarray(ours)
  assert ours.shape == theirs.shape, f"shape {ours.shape}, not {theirs.shape}"
  if not np.issubdtype(theirs.dtype, np.floating):
    return (0.0 if np.array_equal(ours, theirs) else np.inf), False
  theirs = theirs.astype(np.float64)
  ours = ours.astype(np.float64)
  same = np.isfinite(theirs)
  if not np.array_equal(ours[~same], theirs[~same], equal_nan=True):
    return np.inf, False
  if not same.any():
    return 0.0, False
  error = np.abs(ours[same] - theirs[same]).max()
  scale = np.abs(theirs[same]).max()
  return (error, True) if scale == 0 else (error / scale, False)


def compare(golden: Golden, reader: Any, values: dict[str, Any], factor=1):
  """Lines that say which keys are off, and by how much."""
  wrong = []
  for key, ours in values.items():
    error, zero = difference(ours, golden.theirs(key))
    bound = ALL_ZERO_TOLERANCE if zero else tolerance(reader, key)
    if not error <= bound * factor:
      wrong.append(f"{key}: off by {error:.2e}, allowed {bound * factor:.0e}")
  return wrong


def paths() -> list[pathlib.Path]:
  """The files of the folder, largest first so that a slow one starts early."""
  return sorted(FOLDER.glob("*.npz"))


def test_folder_has_files():
  assert paths(), f"no .npz file in {FOLDER}"


@pytest.mark.parametrize("path", paths(), ids=lambda p: p.stem)
def test_golden(path, request):
  reader = reader_of(path.stem)
  assert reader is not None, f"no reader for {path.name}"
  if getattr(reader, "OPTIMISED", False):
    jax.config.update("jax_disable_most_optimizations", False)
    request.addfinalizer(
      lambda: jax.config.update("jax_disable_most_optimizations", True)
    )
  golden = Golden(path, np.float64)
  with jax.enable_x64(True):
    ours = reader.reproduce(golden)
  unknown = sorted(set(ours) - set(golden.keys()))
  assert not unknown, f"reader returns keys the file lacks: {unknown}"
  both = sorted(set(ours) & golden.read)
  assert not both, f"keys read as inputs and claimed as outputs: {both}"
  unlisted = [k for k in ours if lookup(reader.CALLS, k) is None]
  assert not unlisted, f"outputs without a call in CALLS: {unlisted}"
  every = golden.keys()
  left = [
    k
    for k in every
    if k not in ours
    and k not in golden.read
    and lookup(reader.NOT_REPRODUCED, k) is None
  ]
  assert not left, f"neither reproduced nor listed as not reproduced: {left}"
  wrong = compare(golden, reader, ours)
  assert not wrong, "\n".join(["float64:", *wrong])

  single = Golden(path, np.float32)
  values = {
    k: v
    for k, v in reader.reproduce(single).items()
    if "loss" in k and "grad" not in k
  }
  wrong = compare(single, reader, values, FLOAT32_FACTOR)
  assert not wrong, "\n".join(["float32:", *wrong])


def table() -> str:
  """The README's table: one row per pattern of every reader."""
  lines = ["| set | keys | reproduced by | tolerance |", "|---|---|---|---|"]

  def row(*cells):
    lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")

  for path in sorted((HERE / "golden").glob("*.npz")):
    reader = reader_of(path.stem)
    wider = getattr(reader, "TOLERANCE", {})
    for pattern, call in reader.CALLS.items():
      bound = "values 2e-5, gradients 2e-4"
      if pattern in wider:
        bound = f"{wider[pattern][0]:.0e}: {wider[pattern][1]}"
      row(path.stem, f"`{pattern}`", call, bound)
    for pattern, (bound, reason) in wider.items():
      if pattern not in reader.CALLS:
        row(path.stem, f"`{pattern}`", "(as above)", f"{bound:.0e}: {reason}")
    for pattern, reason in reader.NOT_REPRODUCED.items():
      row(path.stem, f"`{pattern}`", f"not reproduced: {reason}", "-")
  return "\n".join(lines) + "\n"


MARK = "<!-- the table below is written by `python -m tests.golden_test` -->\n"


def test_table_is_current():
  text = (HERE / "golden" / "README.md").read_text()
  assert text.split(MARK)[1] == table(), "run: python -m tests.golden_test"


if __name__ == "__main__":
  readme = HERE / "golden" / "README.md"
  readme.write_text(readme.read_text().split(MARK)[0] + MARK + table())
