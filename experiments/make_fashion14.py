"""Makes distilljax/data/files/fashion14.npz from the full Fashion-MNIST.

python -m experiments.make_fashion14 [--folder=...] [--out=...]

Selection: the first 1,000 images of every class of the 60,000 training images
and the first 200 of every class of the 10,000 test images, in their original
order, so that both sets are balanced. Each 28x28 image becomes 14x14 by the
mean of its 2x2 blocks, rounded half up to a whole number: (sum + 2) // 4.

The originals are in Debian's package dataset-fashion-mnist (read from there by
default). Prints the SHA-256 of the file, which `distilljax.data` checks; the
arrays are the same everywhere, the file's bytes only with the same zlib.
"""

import hashlib
import pathlib

import numpy as np
from absl import app, flags

from distilljax import data

_FOLDER = flags.DEFINE_string(
    "folder", None, "folder of the idx files; None looks where data.load does"
)
_OUT = flags.DEFINE_string(
    "file",
    str(
        pathlib.Path(data.__file__).parent / "files" / "fashion14.npz"
    ),
    "the file to write",
)
_PER_CLASS = {"train": 1000, "test": 200}


def make(folder: str | None = None) -> dict[str, np.ndarray]:
  """The arrays of the file: {train,test}_x uint8 [n, 14, 14] and _label."""
  arrays = {}
  for split, count in _PER_CLASS.items():
    images, labels = data.read_fashion_mnist(split, folder=folder)
    rows = np.sort(
        np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(10)])
    )
    blocks = images[rows].reshape(-1, 14, 2, 14, 2).astype(np.uint16)
    means = (blocks.sum(axis=(2, 4)) + 2) // 4
    arrays[f"{split}_x"] = means.astype(np.uint8)
    arrays[f"{split}_label"] = labels[rows].astype(np.uint8)
  return arrays


def main(argv):
  """Writes the file and prints its size and SHA-256."""
  del argv
  np.savez_compressed(_OUT.value, **make(_FOLDER.value))
  content = pathlib.Path(_OUT.value).read_bytes()
  print(f"{_OUT.value}: {len(content)} bytes")
  print(f"sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
  app.run(main)
