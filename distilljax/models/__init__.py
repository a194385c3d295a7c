"""distilljax.models."""
