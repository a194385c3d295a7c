"""distilljax.lm."""
