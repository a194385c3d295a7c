"""Operations whose memory or derivatives plain JAX does not give.

They import nothing but jax, numpy and jaxtyping; kernels for an accelerator are
loaded when they are used.
"""

from distilljax.kernels.jvp_attention.api import attention, attention_jvp
from distilljax.kernels.jvp_attention.context import (
  context_attention,
  from_zigzag,
  sharded_attention,
  zigzag_positions,
)
from distilljax.kernels.linear_head.api import (
  Head,
  LinearTokenStatistics,
  linear_divergence,
  linear_token_statistics,
)

__all__ = [
  "Head",
  "LinearTokenStatistics",
  "attention",
  "attention_jvp",
  "context_attention",
  "from_zigzag",
  "linear_divergence",
  "linear_token_statistics",
  "sharded_attention",
  "zigzag_positions",
]
