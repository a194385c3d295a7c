"""Networks: adapters to (apply_fn, params), and a small zoo in NNX."""

from distilljax.models.network import Network
from distilljax.models.network import count_params
from distilljax.models.network import feature_dim
from distilljax.models.network import from_callable
from distilljax.models.network import from_linen
from distilljax.models.network import from_nnx
from distilljax.models.network import transfer
from distilljax.models.network import with_head
from distilljax.models.zoo import make

__all__ = [
    "Network",
    "count_params",
    "feature_dim",
    "from_callable",
    "from_linen",
    "from_nnx",
    "make",
    "transfer",
    "with_head",
]
