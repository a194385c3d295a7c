"""`kernels.linear_divergence`, with its gradient, against plain JAX and torch.

python -m benchmarks.linear_divergence [--rows N] [--vocab V] [--width D]
  [--rounds N] [--kinds K ...] [--naive] [--compile] [--json F]

Sides in turn in one process with the same number of threads, on the same
float32 hidden states [rows, width] and heads of student and teacher, each
giving the mean loss and its gradient in the student's hidden states and head:

* ours: `kernels.linear_divergence`, its mean, jitted;
* plain: `losses` on logits that are made in full, jitted; with `--naive` the
  formula written down in `jax.numpy` as well;
* torch: logits in full and the formula that TRL's GKD trainer has for the
  generalised JSD and for the KLs, its ends (log-softmax, log-sum-exp of the
  two shifted by log beta and log(1 - beta), two KL terms), eager, where torch
  is installed;
* liger: the chunked `LigerFusedLinearJSDLoss` of Liger, which is torch and no
  kernel and so runs on a CPU, eager, where it is installed; its chunks are
  `--liger-chunk` rows.

With `--compile` the two torch sides also as `torch.compile` makes them. The
side gopd has none in torch. Torch takes a head as its layers keep it, [vocab,
width].

Values and gradients are compared first. Times are medians; CPU seconds are of
all threads, and on a busy machine say more than those of the clock. Memory is
the compiled program's temporary bytes; torch has no such number.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import kernels, losses

KINDS = ("forward_kl", "reverse_kl", "generalized_jsd", "gopd")
# What the kinds of torch's formula are there.
BETAS = {"forward_kl": 0, "reverse_kl": 1, "generalized_jsd": 0.5}
# Sides in torch, and what must be installed.
TORCH = {"torch": "torch", "liger": "liger_kernel"}


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


def _torch(
    kind: str, form: str, chunk: int, compiled: bool, *arrays: Any
) -> Callable[[], Any]:
  """A side in torch.

  Args:
    kind: a key of `BETAS`.
    form: "torch" or "liger".
    chunk: rows of a chunk of "liger".
    compiled: whether `torch.compile` makes it.
    *arrays: hidden states and head of the student, of the teacher.

  Returns:
    Function of no arguments -> (value, gradients).
  """
  import torch
  from torch.nn import functional

  h, w, th, tw = (
      torch.tensor(np.asarray(a.T if i % 2 else a))
      for i, a in enumerate(arrays)
  )
  h.requires_grad_()
  w.requires_grad_()
  beta = BETAS[kind]
  kl = lambda target, of: functional.kl_div(
      of, target, reduction="none", log_target=True
  )

  def loss(h, w):
    q = functional.log_softmax(functional.linear(h, w), dim=-1)
    with torch.no_grad():
      p = functional.log_softmax(functional.linear(th, tw), dim=-1)
    if beta == 0:
      value = kl(p, q)
    elif beta == 1:
      value = kl(q, p)
    else:
      m = torch.logsumexp(
          torch.stack([q + math.log1p(-beta), p + math.log(beta)]), dim=0
      )
      value = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return value.sum() / h.shape[0]

  if form == "liger":
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    layer = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        compiled=compiled,
        chunk_size=chunk,
    )
    labels = torch.zeros(h.shape[0], dtype=torch.long)
    loss = lambda h, w: layer(h, w, th, tw, labels)
  elif compiled:
    loss = torch.compile(loss)

  def run():
    h.grad = w.grad = None
    value = loss(h, w)
    value.backward()
    return value.detach().numpy(), (h.grad.numpy(), w.grad.T.numpy())

  return run


def _threads(used: int) -> int:
  """Gives torch, if it is there, as many threads as XLA has on a CPU."""
  if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(used)
  return used


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
  for form, module in TORCH.items():
    if kind in BETAS and importlib.util.find_spec(module):
      make = functools.partial(_torch, kind, form, args.liger_chunk)
      sides[form] = make(False, *arrays)
      if args.compile:
        sides[f"{form} compiled"] = make(True, *arrays)
  want = jax.tree.map(np.array, sides["plain"]())
  for name, run in sides.items():
    for a, b in zip(jax.tree.leaves(run()), jax.tree.leaves(want)):
      error = np.abs(np.asarray(a) - b).max() / np.abs(b).max()
      if not error < 1e-4:
        raise ValueError(f"{name}: differs in {kind} by {error:.1e}")
  clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
  took = {c: {k: [] for k in sides} for c in clocks}
  for i in range(args.rounds):
    for name in list(sides) if i % 2 else list(reversed(sides)):
      start = {c: clock() for c, clock in clocks.items()}
      sides[name]()
      for c, clock in clocks.items():
        took[c][name].append(clock() - start[c])
  row = {"kind": kind, "memory_bytes": memory}
  for c, times in took.items():
    median = {k: statistics.median(w) for k, w in times.items()}
    row[c] = median
    row[f"{c}_ours_over"] = {k: median["ours"] / m for k, m in median.items()}
  return row


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=1024)
  parser.add_argument("--vocab", type=int, default=32768)
  parser.add_argument("--width", type=int, default=256)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
  parser.add_argument("--naive", action="store_true")
  parser.add_argument("--compile", action="store_true")
  parser.add_argument("--liger-chunk", type=int, default=1024)
  parser.add_argument("--json", help="file for the table")
  args = parser.parse_args()
  threads = _threads(os.cpu_count())
  print(
      f"{jax.devices()[0].platform}, jax {jax.__version__},"
      f" n={args.rows}, v={args.vocab}, d={args.width}, float32,"
      f" {threads} threads, load {os.getloadavg()[0]:.1f}"
  )
  rows = []
  for kind in args.kinds:
    row = compare(kind, args)
    rows.append(row)
    print(kind)
    for name in row["seconds"]:
      held = row["memory_bytes"].get(name)
      held = "" if held is None else f"; temporaries {held / 2**20:.0f} MiB"
      print(
          f"  {name:14s} {row['seconds'][name]:6.2f} s,"
          f" {row['cpu_seconds'][name]:6.2f} CPU s; ours"
          f" {row['seconds_ours_over'][name]:.2f} x,"
          f" {row['cpu_seconds_ours_over'][name]:.2f} x{held}",
          flush=True,
      )
  for module in TORCH.values():
    if not importlib.util.find_spec(module):
      print(f"{module} is not installed: not compared")
  if args.json:
    with open(args.json, "w") as f:
      json.dump(rows, f, indent=2)


if __name__ == "__main__":
  main()
