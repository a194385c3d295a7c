"""distilljax.evals."""
