"""distilljax.processes."""
