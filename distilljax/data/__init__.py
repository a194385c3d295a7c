"""Data: small real sets in the package, readers, iterators with exact state."""

from distilljax.data.iterator import BatchIterator
from distilljax.data.iterator import make_iterator
from distilljax.data.iterator import row_iterator
from distilljax.data.load import Info
from distilljax.data.load import from_tfds
from distilljax.data.load import info
from distilljax.data.load import load
from distilljax.data.load import names
from distilljax.data.load import read_fashion_mnist
from distilljax.data.load import read_idx

__all__ = [
    "BatchIterator",
    "Info",
    "from_tfds",
    "info",
    "load",
    "make_iterator",
    "names",
    "read_fashion_mnist",
    "read_idx",
    "row_iterator",
]
