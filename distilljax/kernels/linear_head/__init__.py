"""Divergences and token statistics from hidden states, without the logits.

`api` is public through `distilljax.kernels`; `xla` computes chunk by chunk of
the vocabulary; `primitives` gives it derivatives in both modes.
"""
