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
from distilljax.data.iterator import (
    BatchIterator,
    StalledSource,
    make_iterator,
    row_iterator,
    source_iterator,
)
from distilljax.data.sources import (
    Info,
    from_tfds,
    image_rows,
    info,
    load,
    names,
    read_fashion_mnist,
    read_idx,
    tfds_source,
)

__all__ = [
    "BatchIterator",
    "Examples",
    "Info",
    "Scores",
    "StalledSource",
    "Task",
    "addition",
    "chain",
    "decode",
    "encode",
    "from_tfds",
    "image_rows",
    "info",
    "json_list",
    "load",
    "make_iterator",
    "names",
    "read_fashion_mnist",
    "read_idx",
    "row_iterator",
    "source_iterator",
    "tfds_source",
]
