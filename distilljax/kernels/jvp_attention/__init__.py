"""Attention that differentiates in both modes, in one pass and linear memory.

`api` is what users call; `primitives` its derivatives; `xla`, `pallas_tpu` and
`reference` compute it. `context` cuts it over a mesh, by a `ring` of devices or
an `exchange` of heads. The folder is not named after the function, which it
would hide.
"""
