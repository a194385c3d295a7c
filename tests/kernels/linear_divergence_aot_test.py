"""Memory of `linear_divergence` on chips that are not here: `pytest -m aot`.

Needs the extra `plan` (a TPU compiler, no TPU); one process at a time. Without
`DISTILLJAX_AOT=all` only v5e is compiled.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from distilljax import kernels
from distilljax.kernels.linear_head import api, tpu_bounds, xla
from tests.kernels.aot import CHIPS, shapes

pytestmark = pytest.mark.aot

GIB = 2**30


def test_there_is_a_bound_for_every_kind_and_each_is_within_the_gate():
  chips = {"v5e", "v5p", "v6e"}
  for chip in chips:
    found = {k for c, k in tpu_bounds.TEMPORARIES if c == chip}
    assert found >= {*api.DENSE, "gopd statistics"}
  assert {c for c, _ in tpu_bounds.TEMPORARIES} == chips
  for (_, case), size in tpu_bounds.TEMPORARIES.items():
    kind, _, form = case.partition(" ")
    one_pass = kind in xla.ONE_PASS and form != "exact"
    assert size <= (0.3 if one_pass else 0.45) * GIB, case


@pytest.mark.parametrize(
    "case", [c for c in tpu_bounds.TEMPORARIES if c[0] in CHIPS], ids=str
)
def test_a_gradient_within_its_bound(case):
  chip, (kind, _, form) = case[0], case[1].partition(" ")
  n, v, d = tpu_bounds.SHAPE

  def loss(h, w, th, tw, rh, rw):
    options = {
        "kind": kind,
        "reference": (rh, rw) if kind == "gopd" else None,
        # What is chosen on the chip: the compiling machine is a CPU.
        "chunk_size": api.CHUNKS[kind == "gopd"],
        "exact": form == "exact",
    }
    if form == "statistics":
      found = kernels.linear_token_statistics(h, w, (th, tw), **options)
      return jnp.mean(found.loss), found
    return jnp.mean(kernels.linear_divergence(h, w, (th, tw), **options)), None

  pair = [((n, d), jnp.bfloat16), ((d, v), jnp.bfloat16)]
  done = (
      jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
      .lower(*shapes(chip, *pair, *pair, *pair))
      .compile()
  )
  assert done.memory_analysis().temp_size_in_bytes <= (
      tpu_bounds.TEMPORARIES[case]
  )
  assert not re.search(rf"\b({n},{v}|{v},{n})\b", done.as_text())
