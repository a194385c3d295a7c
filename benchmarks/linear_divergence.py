"""`kernels.linear_divergence`, forward and backward, against plain JAX.

python -m benchmarks.linear_divergence [--rows N] [--vocab V] [--width D]
  [--rounds N] [--kinds K ...] [--json F]

Two sides in turn in one process, on the same float32 hidden states [rows,
width] and heads [width, vocab] of student and teacher, each giving the mean
loss and its gradient in the student's hidden states and head:

* ours: `kernels.linear_divergence`, its mean, jitted;
* plain: `losses` on logits that are made in full, jitted; with `--naive` the
  formula written down in `jax.numpy` as well.

With `--torch`, where torch is installed, also TRL's formula of the generalised
JSD (and of the KLs, its ends) on logits, eager.

Values and gradients are compared first. Memory is the compiled program's
temporary bytes.
"""

import argparse
import functools
import json
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import kernels, losses

KINDS = ("forward_kl", "reverse_kl", "generalized_jsd", "gopd")


def _ours(kind, h, w, th, tw):
  reference = (th[:, ::-1], tw) if kind == "gopd" else None
  return jnp.mean(
      kernels.linear_divergence(
          h, w, (th, tw), kind=kind, reference=reference
      )
  )  # fmt: skip


def _plain(kind, h, w, th, tw):
  s, t = h @ w, th @ tw
  if kind == "gopd":
    return jnp.mean(losses.gopd_loss(s, t, th[:, ::-1] @ tw))
  return jnp.mean(getattr(losses, kind)(s, t))


def _naive(kind, h, w, th, tw):
  """As one would write it down."""
  q = jax.nn.log_softmax(h @ w, axis=-1)
  p = jax.nn.log_softmax(th @ tw, axis=-1)
  kl = lambda a, b: jnp.sum(jnp.exp(a) * (a - b), axis=-1)
  if kind == "forward_kl":
    return jnp.mean(kl(p, q))
  if kind == "reverse_kl":
    return jnp.mean(kl(q, p))
  if kind == "generalized_jsd":
    m = jnp.logaddexp(p, q) - math.log(2)
    return jnp.mean(0.5 * kl(p, m) + 0.5 * kl(q, m))
  r = jax.nn.log_softmax(th[:, ::-1] @ tw, axis=-1)
  return jnp.mean(
      jnp.sum(jnp.exp(q) * (q - 1.25 * p + 0.25 * r), axis=-1)
  )


def _torch(kind, h, w, th, tw):
  """Function of no arguments -> (value, gradients)."""
  import torch
  from torch.nn import functional

  h, w = (torch.tensor(np.asarray(a), requires_grad=True) for a in (h, w))
  th, tw = (torch.tensor(np.asarray(a)) for a in (th, tw))
  kl = lambda target, of: functional.kl_div(
      of, target, reduction="none", log_target=True
  )

  def run():
    h.grad = w.grad = None
    q = functional.log_softmax(h @ w, dim=-1)
    with torch.no_grad():
      p = functional.log_softmax(th @ tw, dim=-1)
    if kind == "forward_kl":
      value = kl(p, q)
    elif kind == "reverse_kl":
      value = kl(q, p)
    else:
      half = math.log(0.5)
      m = torch.logsumexp(torch.stack([q + half, p + half]), dim=0)
      value = 0.5 * kl(p, m) + 0.5 * kl(q, m)
    value = value.sum() / h.shape[0]
    value.backward()
    return value.detach().numpy(), (h.grad.numpy(), w.grad.numpy())

  return run


def compare(kind: str, args: Any) -> dict[str, Any]:
  """Checks and times the sides for one kind."""
  rng = np.random.default_rng(0)
  size = lambda *s: rng.normal(size=s).astype(np.float32)
  scale = np.float32(2 / math.sqrt(args.width))
  arrays = jax.device_put((
      size(args.rows, args.width), scale * size(args.width, args.vocab),
      size(args.rows, args.width), scale * size(args.width, args.vocab),
  ))  # fmt: skip
  forms = {"ours": _ours, "plain": _plain}
  if args.naive:
    forms["naive"] = _naive
  sides, memory = {}, {}
  for name, form in forms.items():
    program = jax.jit(
        jax.value_and_grad(functools.partial(form, kind), (0, 1))
    )
    compiled = program.lower(*arrays).compile()
    memory[name] = compiled.memory_analysis().temp_size_in_bytes
    sides[name] = lambda run=compiled: jax.block_until_ready(run(*arrays))
  if args.torch and kind != "gopd":
    sides["torch"] = _torch(kind, *arrays)
  want = jax.tree.map(np.asarray, sides["plain"]())
  for name, run in sides.items():
    for a, b in zip(jax.tree.leaves(run()), jax.tree.leaves(want)):
      error = np.abs(np.asarray(a) - b).max() / np.abs(b).max()
      if not error < 1e-4:
        raise ValueError(f"{name}: differs in {kind} by {error:.1e}")
  wall = {k: [] for k in sides}
  for i in range(args.rounds):
    for name in list(sides) if i % 2 else list(reversed(sides)):
      start = time.perf_counter()
      sides[name]()
      wall[name].append(time.perf_counter() - start)
  median = {k: statistics.median(w) for k, w in wall.items()}
  return {
      "kind": kind,
      "seconds": median,
      "ours_over": {k: median["ours"] / m for k, m in median.items()},
      "memory_bytes": memory,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=1024)
  parser.add_argument("--vocab", type=int, default=32768)
  parser.add_argument("--width", type=int, default=256)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
  parser.add_argument("--naive", action="store_true")
  parser.add_argument("--torch", action="store_true")
  parser.add_argument("--json", help="file for the table")
  args = parser.parse_args()
  print(
      f"{jax.devices()[0].platform}, jax {jax.__version__},"
      f" n={args.rows}, v={args.vocab}, d={args.width}, float32"
  )
  rows = []
  for kind in args.kinds:
    row = compare(kind, args)
    rows.append(row)
    times = ", ".join(f"{k} {t:.2f} s" for k, t in row["seconds"].items())
    ratios = ", ".join(
        f"{r:.2f} x {k}" for k, r in row["ours_over"].items() if k != "ours"
    )
    memory = ", ".join(
        f"{k} {b / 2**20:.0f} MiB" for k, b in row["memory_bytes"].items()
    )
    print(f"{kind}: {times}; ours {ratios}; {memory}", flush=True)
  if args.json:
    with open(args.json, "w") as f:
      json.dump(rows, f, indent=2)


if __name__ == "__main__":
  main()
