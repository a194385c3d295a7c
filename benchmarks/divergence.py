"""`generalized_jsd`, forward and backward, against plain JAX and torch.

python -m benchmarks.divergence [--rows N] [--vocab V] [--rounds N] [--json F]

Three sides in turn in one process, on the same float32 logits [rows, vocab],
each giving the mean loss and its gradient in the student's logits:

* ours: `losses.generalized_jsd`, its mean, jitted;
* plain: the formula written down in `jax.numpy`, jitted;
* torch: the formula as TRL's GKD trainer has it (log-softmax, log-sum-exp of
  the two shifted by log beta and log(1 - beta), two KL terms), eager, where
  torch is installed.

Values and gradients are compared first. Memory is the compiled program's
temporary bytes, for torch the bytes its graph keeps for the backward pass (less
than its peak).
"""

import argparse
import importlib.util
import json
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import losses

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def _plain(student, teacher, beta):
  """Mean over the rows of the generalised JSD, as one would write it down."""
  p = jax.nn.log_softmax(teacher, axis=-1)
  q = jax.nn.log_softmax(student, axis=-1)
  kl = lambda a, b: jnp.sum(jnp.exp(a) * (a - b), axis=-1)
  if beta == 0:
    return jnp.mean(kl(p, q))
  if beta == 1:
    return jnp.mean(kl(q, p))
  m = jnp.logaddexp(p + math.log(beta), q + math.log1p(-beta))
  return jnp.mean(beta * kl(p, m) + (1 - beta) * kl(q, m))


def _torch(student, teacher, beta):
  """(function of no arguments -> (value, gradient), bytes kept)."""
  import torch
  from torch.nn import functional

  x = torch.tensor(student, requires_grad=True)
  t = torch.tensor(teacher)

  def loss():
    q = functional.log_softmax(x, dim=-1)
    p = functional.log_softmax(t, dim=-1)
    kl = lambda target, of: functional.kl_div(
        of, target, reduction="none", log_target=True
    )
    if beta == 0:
      value = kl(p, q)
    elif beta == 1:
      value = kl(q, p)
    else:
      mixed = torch.logsumexp(
          torch.stack([q + math.log1p(-beta), p + math.log(beta)]), dim=0
      )
      value = beta * kl(p, mixed) + (1 - beta) * kl(q, mixed)
    return value.sum() / x.shape[0]

  kept = {}

  def pack(tensor):
    kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return tensor

  with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
    held = loss()
  del held
  given = {x.data_ptr(), t.data_ptr()}
  kept = sum(size for at, size in kept.items() if at not in given)

  def run():
    x.grad = None
    value = loss()
    value.backward()
    return value.detach().numpy(), x.grad.numpy()

  return run, kept


def compare(beta: float, rows: int, vocab: int, rounds: int) -> dict[str, Any]:
  """Checks and times the sides at one beta."""
  rng = np.random.default_rng(0)
  student, teacher = (
      2 * rng.normal(size=(2, rows, vocab)).astype(np.float32)
  )
  forms = {
      "ours": lambda s, t: jnp.mean(losses.generalized_jsd(s, t, beta=beta)),
      "plain": lambda s, t: _plain(s, t, beta),
  }
  sides, memory = {}, {}
  put = jax.device_put((student, teacher))
  for name, form in forms.items():
    compiled = jax.jit(jax.value_and_grad(form)).lower(*put).compile()
    memory[name] = compiled.memory_analysis().temp_size_in_bytes
    sides[name] = lambda run=compiled: jax.block_until_ready(run(*put))
  if importlib.util.find_spec("torch"):
    sides["torch"], memory["torch"] = _torch(student, teacher, beta)
  wanted = [np.array(a, np.float64) for a in sides["plain"]()]
  for name, run in sides.items():
    for got, want in zip(run(), wanted):
      error = np.abs(np.asarray(got) - want).max() / np.abs(want).max()
      if not error < 1e-4:
        raise ValueError(f"{name}: differs at beta={beta} by {error:.1e}")
  wall = {k: [] for k in sides}
  for i in range(rounds + 2):
    for name in list(sides) if i % 2 else list(reversed(sides)):
      start = time.perf_counter()
      sides[name]()
      if i >= 2:
        wall[name].append(time.perf_counter() - start)
  median = {k: statistics.median(w) for k, w in wall.items()}
  return {
      "beta": beta,
      "ms": {k: 1e3 * m for k, m in median.items()},
      "ratio": {k: m / median["ours"] for k, m in median.items()},
      "memory_bytes": memory,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=64)
  parser.add_argument("--vocab", type=int, default=32768)
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--json", help="file for the table")
  args = parser.parse_args()
  one = args.rows * args.vocab * 4
  print(
      f"{jax.devices()[0].platform}, jax {jax.__version__}, logits"
      f" [{args.rows}, {args.vocab}] float32 = {one / 2**20:.1f} MiB each"
  )
  rows = []
  for beta in BETAS:
    row = compare(beta, args.rows, args.vocab, args.rounds)
    rows.append(row)
    for side, ms in row["ms"].items():
      print(
          f"beta {beta:.1f} {side:6s} {ms:8.2f} ms  its time / ours"
          f" {row['ratio'][side]:5.2f}  memory"
          f" {row['memory_bytes'][side] / one:5.2f} x the logits",
          flush=True,
      )
  if not importlib.util.find_spec("torch"):
    print("torch is not installed: not compared")
  if args.json:
    with open(args.json, "w", encoding="utf-8") as f:
      table = {"jax": jax.__version__, **vars(args), "rows": rows}
      json.dump(table, f, indent=2)


if __name__ == "__main__":
  main()
