"""distilljax.methods."""
