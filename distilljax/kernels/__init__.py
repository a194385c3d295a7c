"""distilljax.kernels."""
