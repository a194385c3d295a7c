"""Data: small real sets in the package, readers, iterators with exact state."""

from distilljax.data.arithmetic import (
    Examples,
    Scores,
    Task,
    addition,
    chain,
    decode,
    encode,
    json_list,
)
from distilljax.data.iterator import BatchIterator, make_iterator, row_iterator
from distilljax.data.sources import (
    Info,
    from_tfds,
    info,
    load,
    names,
    read_fashion_mnist,
    read_idx,
)

__all__ = [
    "BatchIterator",
    "Examples",
    "Info",
    "Scores",
    "Task",
    "addition",
    "chain",
    "decode",
    "encode",
    "from_tfds",
    "info",
    "json_list",
    "load",
    "make_iterator",
    "names",
    "read_fashion_mnist",
    "read_idx",
    "row_iterator",
]
