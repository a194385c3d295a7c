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


def options_of(case):
  """(kind, what its form means) of a case's name, as "forward_kl exact"."""
  kind, _, form = case.partition(" ")
  return kind, {
      "": {},
      "exact": {"exact": True},
      "statistics": {"statistics": True},
      "tied": {"tied": True},
  }.get(form, {"tail": form})


def test_there_is_a_bound_for_every_kind_and_each_is_within_the_gate():
  tails = ("bucket", "renormalize", "drop")
  for chip in bounds.GATES:
    found = {k for c, k in bounds.TEMPORARIES if c == chip}
    assert found >= {*api.DENSE, "gopd statistics", "forward_kl tied"}
    assert found >= {f"sparse_forward_kl {tail}" for tail in tails}
  assert {c for c, _ in bounds.TEMPORARIES} == set(bounds.GATES)
  for (chip, case), size in bounds.TEMPORARIES.items():
    kind, options = options_of(case)
    one_pass = kind in (*xla.ONE_PASS, *api.SPARSE) and "exact" not in options
    assert size <= bounds.GATES[chip][not one_pass] * GIB, case


@pytest.mark.parametrize(
    "case",
    [c for c in bounds.TEMPORARIES if c[0] in (*aot.CHIPS, "h100")],
    ids=str,
)
def test_a_gradient_within_its_bound(case):
  chip, (kind, options) = case[0], options_of(case[1])
  n, v, d = bounds.SHAPE
  shapes = h100.shapes
  platform = "gpu"
  if chip != "h100":
    shapes, platform = functools.partial(aot.shapes, chip), "tpu"
  statistics = options.pop("statistics", False)
  tied = options.pop("tied", False)
  # What is chosen on the chip: the compiling machine is a CPU.
  chunks = api.CHUNKS[platform]
  options["chunk_size"] = chunks[
      2 if kind in api.SPARSE else int(kind == "gopd")
  ]
  head = functools.partial(kernels.Head, tied=tied)
  model = [((n, d), jnp.bfloat16), ((v, d) if tied else (d, v), jnp.bfloat16)]
  others = model + model * (kind == "gopd")
  if kind in api.SPARSE:
    top_k = (n, bounds.TOP_K)
    others = [(top_k, jnp.int32), (top_k, jnp.float32)]

  def loss(h, w, t, tw, *reference):
    teacher = (t, tw) if kind in api.SPARSE else (t, head(tw))
    given = dict(options, kind=kind, reference=reference or None)
    if statistics:
      found = kernels.linear_token_statistics(h, head(w), teacher, **given)
      return jnp.mean(found.loss), found
    values = kernels.linear_divergence(h, head(w), teacher, **given)
    return jnp.mean(values), None

  done = (
      jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
      .lower(*shapes(*model, *others))
      .compile()
  )
  assert done.memory_analysis().temp_size_in_bytes <= (
      bounds.TEMPORARIES[case]
  )
  text = done.as_text()
  assert not re.search(rf"\b({n},{v}|{v},{n})\b", text)
  if tied:
    # Nor a transpose of a head, which would be a copy of it.
    assert not re.search(rf"\b{d},{v}\b", text)


@pytest.mark.parametrize("chip", aot.CHIPS)
def test_the_kernel_keeps_logits_on_the_chip(chip):
  n, v, d = bounds.SHAPE
  model = [((n, d), jnp.bfloat16), ((d, v), jnp.bfloat16)]
  sizes = aot.shapes(chip, *model, *model)

  def loss(h, w, t, tw):
    return kernels.linear_divergence(
        h, w, (t, tw), kind="forward_kl", implementation="pallas_tpu"
    )

  with jax.set_mesh(sizes[0].sharding.mesh):
    done = jax.jit(loss).lower(*sizes).compile()
  assert done.memory_analysis().temp_size_in_bytes <= (
      bounds.KERNEL_TEMPORARIES[chip]
  )
  assert "linear_head_statistics" in done.as_text()
