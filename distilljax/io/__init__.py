"""distilljax.io."""
