"""Configs to be planned by `experiments.plan`, too large to be run here."""
