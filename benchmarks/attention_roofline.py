"""Attention on the TPU or GPU that is here, beside what the chip could do.

python -m benchmarks.attention_roofline [N ...] [--chip NAME] [--json FILE]
    [--implementation NAME] [--calls C] [--rounds R]

Per program (forward, jvp, gradient, MeanFlow step) and length, bfloat16, one
batch row, heads of width 128 (or --width): milliseconds of a call, the median
of R timings of C calls in a row, and the share of the chip's peak that the
formula's FLOPs make of it (`distilljax.plan.count_flops`: what a kernel
computes twice does not count). The roof is the larger of FLOPs over peak and of
inputs and outputs over the memory's rate. Nobody has run this on a chip yet.
"""

import argparse
import json
import math
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import PROGRAMS
from distilljax import kernels, plan

LENGTHS = (1024, 2048, 4096, 8192, 16384)
# How `device_kind` calls a chip of `plan.CHIPS`, beginnings, longest first.
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU v5": "v5p",
    "NVIDIA H100": "h100",
}


def forward(attend, x, t):
  del t
  return attend(*x)


def gradient(attend, x, t):
  return jax.vjp(attend, *x)[1](t[0])


ALL = {
    "forward": forward,
    "gradient": gradient,
    "jvp": PROGRAMS["jvp"],
    "mean_flow": lambda attend, x, t: PROGRAMS["mean_flow"](
        lambda *x: attend(*x).astype(jnp.float32),
        x,
        t,
    ),
}


def chip_here() -> str | None:
  """The name in `plan.CHIPS` of the first device's chip, if it has one."""
  kind = jax.devices()[0].device_kind
  for start in sorted(KINDS, key=len, reverse=True):
    if kind.startswith(start):
      return KINDS[start]
  return None


def nbytes(tree: Any) -> int:
  """Of all arrays, or of their shapes."""
  return sum(
      math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree)
  )


def measure(
    program: str, length: int, chip: plan.Chip, args: argparse.Namespace
) -> dict[str, Any]:
  """One row of the table."""
  rng = np.random.default_rng(0)
  shape = (1, length, args.heads, args.width)
  draw = lambda: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  x, t = (draw(), draw(), draw()), (draw(), draw(), draw())

  def attend(q, k, v):
    return kernels.attention(
        q, k, v, causal=args.causal, implementation=args.implementation
    )

  fn = lambda x, t: ALL[program](attend, x, t)
  flops = plan.count_flops(jax.make_jaxpr(fn)(x, t)).total
  moved = nbytes((x, jax.eval_shape(fn, x, t)))
  moved += 0 if program == "forward" else nbytes(t)
  compiled = jax.jit(fn).lower(x, t).compile()
  jax.block_until_ready(compiled(x, t))
  seconds = []
  for _ in range(args.rounds):
    start = time.perf_counter()
    for _ in range(args.calls):
      out = compiled(x, t)
    jax.block_until_ready(out)
    seconds.append((time.perf_counter() - start) / args.calls)
  took = statistics.median(seconds)
  roof = max(flops / chip.flops, moved / chip.hbm_rate)
  return {
      "program": program,
      "n": length,
      "ms": 1e3 * took,
      "least_ms": 1e3 * min(seconds),
      "roof_ms": 1e3 * roof,
      "of_roof": roof / took,
      "of_peak": flops / chip.flops / took,
      "gflops": flops / 1e9,
      "temporaries_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("length", nargs="*", type=int, help="rows and columns")
  parser.add_argument("--chip", choices=sorted(plan.CHIPS), help="the roof")
  parser.add_argument("--implementation", help="default: the platform's")
  parser.add_argument("--heads", type=int, default=16)
  parser.add_argument("--width", type=int, default=128)
  parser.add_argument("--causal", action="store_true")
  parser.add_argument("--calls", type=int, default=10)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--json", help="file for the table")
  args = parser.parse_args()
  name = args.chip or chip_here()
  device = jax.devices()[0]
  if name is None:
    sys.exit(
        f"error: no roof is known for {device.device_kind!r}; name one with"
        f" --chip={'|'.join(plan.CHIPS)}"
    )
  print(f"{device.device_kind}, roof of {name}, jax {jax.__version__}")
  print(
      f"{'program':>10s} {'n':>6s} {'ms':>9s} {'roof ms':>9s} {'of roof':>8s}"
      f" {'of peak':>8s} {'temp MiB':>9s}"
  )
  rows = []
  for program in ALL:
    for length in args.length or LENGTHS:
      row = measure(program, length, plan.CHIPS[name], args)
      rows.append(row)
      print(
          f"{program:>10s} {length:6d} {row['ms']:9.3f} {row['roof_ms']:9.3f}"
          f" {row['of_roof']:8.1%} {row['of_peak']:8.1%}"
          f" {row['temporaries_mib']:9.1f}",
          flush=True,
      )
  if args.json:
    with open(args.json, "w", encoding="utf-8") as f:
      found = {"device": device.device_kind, "chip": name, "rows": rows}
      json.dump({**found, "jax": jax.__version__}, f, indent=2)


if __name__ == "__main__":
  main()
