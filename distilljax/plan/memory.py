"""Bytes that a step's state takes on one chip, by network and kind."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from distilljax.typing import PyTree


def bytes_per_chip(tree: PyTree) -> int:
  """Bytes of one chip's part of every array, exactly.

  Args:
    tree: of arrays or `jax.ShapeDtypeStruct`s with shardings.

  Returns:
    Bytes, without the padding of a chip's own layout.
  """
  total = 0
  for leaf in jax.tree.leaves(tree):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    sharding = getattr(leaf, "sharding", None)
    shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
    total += math.prod(shape) * leaf.dtype.itemsize
  return total


def by_network(
  networks: Mapping[str, Mapping[str, PyTree]]
) -> list[dict[str, Any]]:
  """Rows of a table: what each network holds on one chip.

  Args:
    networks: name -> kind ("parameters", "optimizer", "ema", ...) -> arrays or
      shapes with shardings.

  Returns:
    {"network", "kind", "numbers" (of the whole, not of a chip), "bytes" (of a
    chip)}, in order.
  """
  return [
    {
      "network": name,
      "kind": kind,
      "numbers": sum(leaf.size for leaf in jax.tree.leaves(tree)),
      "bytes": bytes_per_chip(tree),
    }
    for name, kinds in networks.items()
    for kind, tree in kinds.items()
  ]
