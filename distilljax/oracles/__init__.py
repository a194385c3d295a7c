"""distilljax.oracles."""
