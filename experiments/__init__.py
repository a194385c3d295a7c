"""Launchers, run from the checkout."""
