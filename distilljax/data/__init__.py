"""distilljax.data."""
