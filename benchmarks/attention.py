"""`kernels.attention` ("xla") against `jax.nn.dot_product_attention` on CPU.

python -m benchmarks.attention [N ...] [--rounds R] [--json FILE]

Two programs per length, float32, one batch row and two heads of width 64: value
and tangent (`jax.jvp`), and a MeanFlow step (the gradient of a residual whose
target is a tangent under stop_gradient). Both sides run in turn in one process;
the ratio is that of the median wall times, beside it that of the least ones.
Memory is what the compiler reserves for temporaries.
"""

import argparse
import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import kernels

LENGTHS = (512, 1024, 2048, 4096, 8192)
SIDES = {
    "ours": functools.partial(kernels.attention, implementation="xla"),
    "jax": jax.nn.dot_product_attention,
}


def jvp(attend, x, t):
  return jax.jvp(attend, x, t)


def mean_flow(attend, x, t):
  def loss(x):
    u, slope = jax.jvp(attend, x, t)
    return jnp.sum((u - jax.lax.stop_gradient(jnp.cos(u) + slope)) ** 2)

  return jax.value_and_grad(loss)(x)


PROGRAMS = {"jvp": jvp, "mean_flow": mean_flow}


def compare(program: str, length: int, rounds: int) -> dict[str, Any]:
  """Times both sides of a program in turn, and reads their memory."""
  rng = np.random.default_rng(0)
  draw = lambda: jnp.asarray(rng.normal(size=(1, length, 2, 64)), jnp.float32)
  x, t = (draw(), draw(), draw()), (draw(), draw(), draw())
  row: dict[str, Any] = {"program": program, "n": length, "rounds": rounds}
  compiled, seconds = {}, {side: [] for side in SIDES}
  for side, attend in SIDES.items():
    fn = jax.jit(functools.partial(PROGRAMS[program], attend))
    compiled[side] = fn.lower(x, t).compile()
    memory = compiled[side].memory_analysis().temp_size_in_bytes
    row[f"{side}_mib"] = memory / 2**20
  for i in range(rounds + 1):
    for side in list(SIDES) if i % 2 else list(SIDES)[::-1]:
      start = time.perf_counter()
      jax.block_until_ready(compiled[side](x, t))
      if i:
        seconds[side].append(time.perf_counter() - start)
  for side in SIDES:
    row[f"{side}_ms"] = 1e3 * statistics.median(seconds[side])
  row["ratio"] = row["ours_ms"] / row["jax_ms"]
  row["least_ratio"] = min(seconds["ours"]) / min(seconds["jax"])
  return row


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("length", nargs="*", type=int, help="rows and columns")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--json", help="file for the table")
  args = parser.parse_args()
  print(f"{jax.devices()[0].platform}, jax {jax.__version__}")
  print(
      f"{'program':>10s} {'n':>6s} {'ours ms':>9s} {'jax ms':>9s}"
      f" {'ratio':>6s} {'of min':>6s} {'ours MiB':>9s} {'jax MiB':>9s}"
  )
  rows = []
  for program in PROGRAMS:
    for length in args.length or LENGTHS:
      row = compare(program, length, args.rounds)
      rows.append(row)
      print(
          f"{program:>10s} {length:6d} {row['ours_ms']:9.1f}"
          f" {row['jax_ms']:9.1f} {row['ratio']:6.2f}"
          f" {row['least_ratio']:6.2f} {row['ours_mib']:9.1f}"
          f" {row['jax_mib']:9.1f}",
          flush=True,
      )
  if args.json:
    with open(args.json, "w", encoding="utf-8") as f:
      json.dump({"jax": jax.__version__, "rows": rows}, f, indent=2)


if __name__ == "__main__":
  main()
