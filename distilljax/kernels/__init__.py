"""Operations whose memory or derivatives plain JAX does not give.

They import nothing but jax, numpy and jaxtyping; kernels for an accelerator are
loaded when they are used.
"""

from distilljax.kernels.jvp_attention.api import attention, attention_jvp

__all__ = ["attention", "attention_jvp"]
