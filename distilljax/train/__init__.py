"""distilljax.train."""
