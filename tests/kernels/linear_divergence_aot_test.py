"""Memory of `linear_divergence` on chips that are not here: `pytest -m aot`.

Needs the extra `plan` (a TPU compiler, no TPU); one process at a time. Without
`DISTILLJAX_AOT=all` only v5e is compiled of TPUs. For an H100 it needs CUDA's
compilers, in an environment of their own (docs/api/kernels.md).
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from distilljax import kernels
from distilljax.kernels.linear_head import api, bounds, xla
from tests.kernels import aot, h100

pytestmark = pytest.mark.aot

GIB = 2**30


def test_there_is_a_bound_for_every_kind_and_each_is_within_the_gate():
  for chip in bounds.GATES:
    found = {k for c, k in bounds.TEMPORARIES if c == chip}
    assert found >= {*api.DENSE, "gopd statistics"}
  assert {c for c, _ in bounds.TEMPORARIES} == set(bounds.GATES)
  for (chip, case), size in bounds.TEMPORARIES.items():
    kind, _, form = case.partition(" ")
    one_pass = kind in xla.ONE_PASS and form != "exact"
    assert size <= bounds.GATES[chip][not one_pass] * GIB, case


@pytest.mark.parametrize(
    "case",
    [c for c in bounds.TEMPORARIES if c[0] in (*aot.CHIPS, "h100")],
    ids=str,
)
def test_a_gradient_within_its_bound(case):
  chip, (kind, _, form) = case[0], case[1].partition(" ")
  n, v, d = bounds.SHAPE
  shapes = h100.shapes
  platform = "gpu"
  if chip != "h100":
    shapes, platform = functools.partial(aot.shapes, chip), "tpu"

  def loss(h, w, th, tw, rh, rw):
    options = {
        "kind": kind,
        "reference": (rh, rw) if kind == "gopd" else None,
        # What is chosen on the chip: the compiling machine is a CPU.
        "chunk_size": api.CHUNKS[platform][kind == "gopd"],
        "exact": form == "exact",
    }
    if form == "statistics":
      found = kernels.linear_token_statistics(h, w, (th, tw), **options)
      return jnp.mean(found.loss), found
    return jnp.mean(kernels.linear_divergence(h, w, (th, tw), **options)), None

  pair = [((n, d), jnp.bfloat16), ((d, v), jnp.bfloat16)]
  done = (
      jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
      .lower(*shapes(*pair, *pair, *pair))
      .compile()
  )
  assert done.memory_analysis().temp_size_in_bytes <= (
      bounds.TEMPORARIES[case]
  )
  assert not re.search(rf"\b({n},{v}|{v},{n})\b", done.as_text())
