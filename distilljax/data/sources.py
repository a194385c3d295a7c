"""Small real data sets by name, and the idx reader of the full Fashion-MNIST.

The files of `digits` and `fashion14` are part of the package; their licences
and how they were made stand beside them in `files/`.
"""

import gzip
import hashlib
import io
import os
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from distilljax import _checks

_FILES = pathlib.Path(__file__).parent / "files"
_SHA256 = {
    "digits.csv.gz": (
        "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
    ),
    "fashion14.npz": (
        "7b2ef2cee397226fd7f86085562bc75e034bd151d49806335e790979cbd0295a"
    ),
}
_DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
_ENVIRONMENT = "DISTILLJAX_DATA"
_SPLITS = ("train", "test")
_DIGITS_TRAIN = 1400
_FASHION_CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)


class Info(NamedTuple):
  """What a job must know of a data set before it is loaded.

  Attributes:
    sample_shape: shape of one sample, (h, w, c).
    num_classes: labels are 0..num_classes - 1.
    class_names: a word for every label.
    rows: number of rows by split.
  """

  sample_shape: tuple[int, ...]
  num_classes: int
  class_names: tuple[str, ...]
  rows: dict[str, int]


_INFO = {
    "digits": Info(
        (8, 8, 1),
        10,
        tuple(str(i) for i in range(10)),
        {"train": _DIGITS_TRAIN, "test": 1797 - _DIGITS_TRAIN},
    ),
    "fashion14": Info(
        (14, 14, 1), 10, _FASHION_CLASSES, {"train": 10000, "test": 2000}
    ),
    "fashion28": Info(
        (28, 28, 1), 10, _FASHION_CLASSES, {"train": 60000, "test": 10000}
    ),
}


def names() -> tuple[str, ...]:
  """Names that `load` knows."""
  return tuple(_INFO)


def info(name: str) -> Info:
  """Shape, classes and sizes of a data set, without reading it.

  Args:
    name: "digits", "fashion14" or "fashion28".

  Returns:
    An `Info`.

  Raises:
    ValueError: unknown name (with the nearest valid one).
  """
  _checks.one_of("info", "name", name, _INFO)
  return _INFO[name]


def load(
    name: str, split: str = "train", *, folder: str | os.PathLike | None = None
) -> dict[str, np.ndarray]:
  """A data set in memory.

  * `digits`: 1,797 handwritten digits of 8x8 pixels with values 0..16, shuffled
    once for all into 1,400 training and 397 test images.
  * `fashion14`: Fashion-MNIST as 2x2 means, 10,000 training and 2,000 test
    images of 14x14 pixels, the same number of every class.
  * `fashion28`: the full Fashion-MNIST, 60,000 and 10,000 of 28x28, read from
    `folder`, else from the folder that the environment variable
    DISTILLJAX_DATA names, else from where Debian's package
    dataset-fashion-mnist puts it.

  Args:
    name: "digits", "fashion14" or "fashion28".
    split: "train" or "test".
    folder: where the idx files of fashion28 are; no other set takes one.

  Returns:
    {"x": float32 [n, h, w, 1] in [-1, 1], "label": int32 [n]}.

  Raises:
    ValueError: unknown name or split, or a corrupt file.
    FileNotFoundError: a file is missing; the message says how to get it.

  Example:
    >>> arrays = load("digits", "test")
    >>> arrays["x"].shape, arrays["label"].shape
    ((397, 8, 8, 1), (397,))
  """
  _checks.one_of("load", "name", name, _INFO)
  _checks.one_of("load", "split", split, _SPLITS)
  if folder is not None and name != "fashion28":
    _checks.fail("load", "folder", f"None for {name!r}", repr(str(folder)))
  if name == "digits":
    images, labels = _digits(split)
    top = 16
  elif name == "fashion14":
    with np.load(io.BytesIO(_packaged("fashion14.npz"))) as file:
      images, labels = file[f"{split}_x"], file[f"{split}_label"]
    top = 255
  else:
    images, labels = read_fashion_mnist(split, folder=folder)
    top = 255
  return {
      "x": _scaled(images, top)[..., None],
      "label": labels.astype(np.int32),
  }


def _scaled(images: np.ndarray, top: int) -> np.ndarray:
  """Whole numbers 0..top as float32 in [-1, 1], both ends exact."""
  return (2 * images.astype(np.float32) - np.float32(top)) / np.float32(top)


def _packaged(file: str) -> bytes:
  """The bytes of a file of the package, with its recorded checksum."""
  path = _FILES / file
  if not path.is_file():
    raise FileNotFoundError(
        f"load: {path} is missing from the package; install distilljax again"
    )
  content = path.read_bytes()
  digest = hashlib.sha256(content).hexdigest()
  if digest != _SHA256[file]:
    raise ValueError(
        f"load: {path} is corrupt: SHA-256 must be {_SHA256[file][:12]}..., got"
        f" {digest[:12]}... ({len(content)} bytes); install distilljax again"
    )
  return content


def _digits(split):
  text = gzip.decompress(_packaged("digits.csv.gz")).decode()
  table = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.int32)
  # RandomState's stream is frozen for good, a Generator's is not.
  order = np.random.RandomState(0).permutation(len(table))  # noqa: NPY002
  rows = (
      order[:_DIGITS_TRAIN] if split == "train" else order[_DIGITS_TRAIN:]
  )
  return table[rows, :-1].reshape(-1, 8, 8), table[rows, -1]


def read_idx(path: str | os.PathLike) -> np.ndarray:
  """Reads one idx file of unsigned bytes, gzipped or not.

  The format: two zero bytes, the type (8 = unsigned byte), the number of axes,
  each axis as a big-endian 32-bit number, then the values in C order.

  Args:
    path: the file; a name that ends in ".gz" is decompressed.

  Returns:
    uint8 array, read-only.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not such a file, or cut short.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"read_idx: no file {path}")
  content = path.read_bytes()
  if path.suffix == ".gz":
    try:
      content = gzip.decompress(content)
    except (OSError, EOFError, gzip.zlib.error) as error:
      raise ValueError(
          f"read_idx: {path} is corrupt: not a whole gzip file ({error})"
      ) from error
  axes = content[3] if len(content) > 3 else 0
  start = 4 + 4 * axes
  if content[:3] != b"\x00\x00\x08" or not axes or len(content) < start:
    raise ValueError(f"read_idx: {path} is no idx file of unsigned bytes")
  dims = struct.unpack(f">{axes}I", content[4:start])
  count = int(np.prod(dims, dtype=np.int64))
  if len(content) - start != count:
    raise ValueError(
        f"read_idx: {path} is corrupt: {list(dims)} needs {count} values, got"
        f" {len(content) - start}"
    )
  return np.frombuffer(content, np.uint8, offset=start).reshape(dims)


def read_fashion_mnist(
    split: str, *, folder: str | os.PathLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Images uint8 [n, 28, 28] and labels uint8 [n] of the full Fashion-MNIST.

  Args:
    split: "train" or "test".
    folder: where the four idx files are, gzipped or not; None looks in the
      folder named by DISTILLJAX_DATA, then where Debian's package puts them. A
      sub-folder fashion-mnist of either is found too.

  Returns:
    (images, labels).

  Raises:
    FileNotFoundError: not found; the message says how to get them.
    ValueError: a corrupt file, or not the shapes of this set.
  """
  _checks.one_of("read_fashion_mnist", "split", split, _SPLITS)
  prefix = {"train": "train", "test": "t10k"}[split]
  wanted = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
  if folder is not None:
    places = [pathlib.Path(folder)]
  else:
    named = os.environ.get(_ENVIRONMENT)
    places = ([pathlib.Path(named)] if named else []) + [_DEBIAN]
  for place in places:
    for inner in (place, place / "fashion-mnist"):
      found = [
          next(
              (p for p in (inner / f"{w}.gz", inner / w) if p.is_file()), None
          )
          for w in wanted
      ]
      if all(found):
        images, labels = (read_idx(p) for p in found)
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
          raise ValueError(
              f"read_fashion_mnist: {inner} must hold images [n, 28, 28] and"
              f" labels [n], got {list(images.shape)} and {list(labels.shape)}"
          )
        return images, labels
  raise FileNotFoundError(
      f"fashion28: no {wanted[0]}[.gz] with its labels in"
      f" {' or '.join(str(p) for p in places)}; apt-get install"
      f" dataset-fashion-mnist, or name the folder of the four idx files"
      f" (folder= or ${_ENVIRONMENT})"
  )


def tfds_source(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike | None = None,
) -> Any:
  """A prepared TensorFlow Datasets set as a source, without TensorFlow.

  It is `tfds.data_source`, so the set must have been prepared in a
  random-access format (array_record). Nothing is downloaded: offline that would
  hang for minutes before it fails.

  Args:
    name: name of the set, such as "mnist" or "my_set/config:1.0.0".
    split: its split.
    data_dir: where the prepared sets are; None is the package's default.

  Returns:
    Its records by number, for `source_iterator`; see `image_rows`.

  Raises:
    ImportError: the extra `data` is not installed.
  """
  try:
    import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top
  except ImportError as error:
    raise ImportError(
        "tfds_source: tensorflow-datasets is not installed; pip install"
        " 'distilljax[data]'"
    ) from error
  return tfds.data_source(name, split=split, data_dir=data_dir, download=False)


def image_rows(
    *, image: str = "image", label: str = "label"
) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
  """Records of an image set as rows: the `transform` of `source_iterator`.

  Args:
    image: feature with the pixels, unsigned bytes [h, w] or [h, w, c].
    label: feature with the class.

  Returns:
    record -> {"x": float32 [h, w, c] in [-1, 1], "label": int32 []}; it raises
    ValueError for no such feature, or pixels that are not unsigned bytes.
  """

  def row(record):
    for feature in (image, label):
      _checks.one_of("image_rows", "feature", feature, record)
    pixels = np.asarray(record[image])
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
      _checks.fail(
          "image_rows",
          f"feature {image!r}",
          "uint8 [h, w] or [h, w, c]",
          f"{pixels.dtype} {list(pixels.shape)}",
      )
    x = _scaled(pixels, 255)
    return {
        "x": x[..., None] if x.ndim == 2 else x,
        "label": np.asarray(record[label], np.int32),
    }

  return row


def from_tfds(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike | None = None,
    image: str = "image",
    label: str = "label",
    limit: int | None = None,
) -> dict[str, np.ndarray]:
  """A prepared TensorFlow Datasets image set in memory; see `tfds_source`.

  Args:
    name: name of the set, such as "mnist" or "my_set/config:1.0.0".
    split: its split.
    data_dir: where the prepared sets are; None is the package's default.
    image: feature with the pixels, unsigned bytes [h, w] or [h, w, c].
    label: feature with the class.
    limit: read only the first rows; None reads all.

  Returns:
    {"x": float32 [n, h, w, c] in [-1, 1], "label": int32 [n]}.

  Raises:
    ImportError: the extra `data` is not installed.
    ValueError: no such feature, or pixels that are not unsigned bytes.
  """
  source = tfds_source(name, split, data_dir=data_dir)
  row = image_rows(image=image, label=label)
  count = len(source) if limit is None else min(limit, len(source))
  rows = [row(source[i]) for i in range(count)]
  return {k: np.stack([r[k] for r in rows]) for k in ("x", "label")}
