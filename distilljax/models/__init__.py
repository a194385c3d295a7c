"""Networks: adapters to (apply_fn, params), and a small zoo in NNX."""

from distilljax.models.layers import cut_rows
from distilljax.models.network import (
    Network,
    count_params,
    feature_dim,
    from_callable,
    from_linen,
    from_nnx,
    transfer,
    with_head,
)
from distilljax.models.transformer import KVCache, output_head
from distilljax.models.zoo import make

__all__ = [
    "KVCache",
    "Network",
    "count_params",
    "cut_rows",
    "feature_dim",
    "from_callable",
    "from_linen",
    "from_nnx",
    "make",
    "output_head",
    "transfer",
    "with_head",
]
