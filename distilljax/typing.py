"""Shared type aliases for annotations.

Dimension names used across the library: `*b` leading axes, `b` batch, `*s` the
non-batch axes of a sample, `l` length, `v` vocabulary, `k` top-k, `d` and `e`
feature widths, `h w c` image axes.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, Scalar, Shaped

# A Python number: an annotation `float` alone would refuse the integer 1.
Number = float | int
# A nested dict of arrays: the parameters of one network.
Params = Any
# Any pytree of arrays.
PyTree = Any
# fn(x_t, t) -> x0, velocity, ... with x_t [b, *s] and t [b].
PredictionFn = Callable[..., jax.Array]
# fn(x_t, t) -> x0 estimate; EDM-style functions take sigma in place of t.
DenoiseFn = Callable[..., jax.Array]
# fn(x_t, t, r) -> mean velocity from t down to r.
FlowMapFn = Callable[..., jax.Array]
# fn(a, b) -> [b]: a distance between two batches of samples, per row.
Metric = Callable[..., jax.Array]

__all__ = [
    "Array",
    "Bool",
    "DenoiseFn",
    "Float",
    "FlowMapFn",
    "Int",
    "Key",
    "Metric",
    "Number",
    "PRNGKeyArray",
    "Params",
    "PredictionFn",
    "PyTree",
    "Scalar",
    "Shaped",
]
