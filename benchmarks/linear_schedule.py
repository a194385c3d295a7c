"""Passes of `linear_divergence` on TPUs that are not here: chunks or kernel.

python -m benchmarks.linear_schedule [--chip v5e,v6e,v5p] [--kind KIND]
    [--rows N] [--vocab V] [--width D] [--json FILE]

Needs the extra `plan` (a TPU compiler). Compiles the value (no gradient) of
both implementations ahead of time, student and teacher [rows, width] and
[width, vocab] in bfloat16, and adds up the bundles of instructions that the
compiler scheduled, each as often as it runs: a fusion's for every block of its
window in every chunk, the kernel's for every step of its grid, and those of its
sums for every part of rows. These are issue slots, not time: waiting for memory
is in neither. Where a fusion only streams logits, what counts is the larger of
its bundles and of its bytes at the memory's rate, and both are printed. `bound`
is the matrix unit at its peak.

One fresh process and a temporary folder for each program.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any
from unittest import mock

from benchmarks import kernel_schedule
from distilljax.plan import chips

# Cycles a second of the cores, and cores that share the work of a chip.
CORES = {"v5e": (1.5e9, 1), "v5p": (1.75e9, 2), "v6e": (1.75e9, 1)}
FORMS = ("xla", "pallas_tpu", "pallas_tpu without sums")
SMALL_CYCLES = 50_000  # of a fusion that is only about rows


def compile_one(
    chip: str, kind: str, form: str, rows: int, vocab: int, width: int
) -> dict[str, Any]:
  """Compiles a form in this process.

  Args:
    chip: a key of `CORES`.
    kind: of `kernels.linear_divergence`.
    form: one of `FORMS`.
    rows: n.
    vocab: v.
    width: d.

  Returns:
    Temporary bytes, (blocks, the compiler's guess of cycles) of each fusion,
    chunks, and steps and parts of the kernel.
  """
  import jax

  from distilljax import kernels
  from distilljax.kernels.linear_head import api, pallas_tpu

  chunk = api.CHUNKS["tpu"][0]
  implementation = form.partition(" ")[0]

  def value(h, w, t, tw):
    return kernels.linear_divergence(
        h, w, (t, tw), kind=kind, implementation=implementation,
        chunk_size=chunk,
    )  # fmt: skip

  model = [((rows, width), "bfloat16"), ((width, vocab), "bfloat16")]
  sizes = kernel_schedule.shapes(chip, *model, *model)
  # A loop of no step: what is left is the product.
  skip = mock.patch.object(
      jax.lax, "fori_loop", lambda low, high, body, start: start
  )
  with jax.set_mesh(sizes[0].sharding.mesh):
    if form == FORMS[2]:
      with skip:
        done = jax.jit(value).lower(*sizes).compile()
    else:
      done = jax.jit(value).lower(*sizes).compile()
  fusions = {}
  for line in done.as_text().splitlines():
    name = re.match(r"\s*(?:ROOT )?%([\w.-]+) = ", line)
    window = re.search(
        r'"estimated_cycles":"(\d+)","iteration_bounds":\[([^\]]+)\]', line
    )
    if name and window and int(window[1]) > SMALL_CYCLES:
      blocks = math.prod(int(a) for a in re.findall(r"\d+", window[2]))
      fusions[name[1]] = (blocks, int(window[1]))
  tile = pallas_tpu.tile(rows, vocab, [width] * 2, 2)
  blocks = math.ceil(rows / tile.rows) * math.ceil(vocab / tile.columns)
  return {
      "temporaries": done.memory_analysis().temp_size_in_bytes,
      "fusions": fusions,
      "chunks": math.ceil(vocab / chunk),
      "steps": blocks * (width // tile.depth),
      "parts": blocks * (tile.rows // tile.part),
  }


def by_chunks(chip, facts, found, streamed):
  """(bundles of the products, of what streams logits, the compiler's guess)."""
  products = streams = guess = 0
  clock, cores = CORES[chip]
  known = {
      facts["fusions"][k][1]: units["bundles"]
      for k, units in found.items() if k in facts["fusions"]
  }  # fmt: skip
  for name, (blocks, cycles) in facts["fusions"].items():
    # Fusions that are alike are compiled, and written down, once.
    bundles = known[cycles] * blocks * facts["chunks"] / cores
    guess += cycles * facts["chunks"]
    if name in found and not found[name]["MXU"]:
      streams += bundles
    else:
      products += bundles
  waited = streamed / chips.CHIPS[chip].hbm_rate * clock
  return products, max(streams, waited), guess


def measure(
    chip: str, kind: str, rows: int, vocab: int, width: int
) -> dict[str, Any]:
  """Compiles all forms in processes of their own.

  Args:
    chip: a key of `CORES`.
    kind: of `kernels.linear_divergence`.
    rows: n.
    vocab: v.
    width: d.

  Returns:
    A row of the table, in millions of bundles a core.
  """
  setting = {"kind": kind, "rows": rows, "vocab": vocab, "width": width}
  clock, cores = CORES[chip]
  row = {"chip": chip, **setting}
  kernel = {}
  for form in FORMS:
    with tempfile.TemporaryDirectory() as folder:
      flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
      call = json.dumps({"chip": chip, "form": form, **setting})
      done = subprocess.run(
          [sys.executable, "-m", "benchmarks.linear_schedule", "--one", call],
          stdout=subprocess.PIPE,
          text=True,
          check=True,
          env={**os.environ, **chips.ENVIRONMENT, "LIBTPU_INIT_ARGS": flags},
      )
      facts = json.loads(done.stdout.splitlines()[-1])
      found = kernel_schedule.all_schedules(pathlib.Path(folder))
    if form == "xla":
      # Logits of both models, read once more by what only streams them.
      sums = by_chunks(chip, facts, found, 8 * rows * vocab)
      row["products"], row["streams"], row["guess"] = (a / 1e6 for a in sums)
      row["temporaries"] = facts["temporaries"]
      continue
    (name,) = [k for k in found if k.startswith("linear_head")]
    kernel[form] = found[name]["bundles"]
    if form == "pallas_tpu":
      row["kernel_temporaries"] = facts["temporaries"]
  bare = kernel[FORMS[2]]
  part = kernel["pallas_tpu"] - bare
  row["kernel_products"] = bare * facts["steps"] / cores / 1e6
  row["kernel_sums"] = part * facts["parts"] / cores / 1e6
  flops = 4 * rows * vocab * width
  row["bound"] = flops / chips.CHIPS[chip].flops * clock / 1e6
  row["xla"] = row["products"] + row["streams"]
  # Slots of the kernel's products are fewer than the matrix unit takes.
  products = max(row["kernel_products"], row["bound"])
  row["kernel"] = products + row["kernel_sums"]
  row["ratio"] = row["kernel"] / row["xla"]
  return row


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chip", type=lambda a: a.split(","), default=["v5e"])
  parser.add_argument("--kind", default="forward_kl")
  parser.add_argument("--rows", type=int, default=8192)
  parser.add_argument("--vocab", type=int, default=151936)
  parser.add_argument("--width", type=int, default=4096)
  parser.add_argument("--json", help="file for the table")
  parser.add_argument("--one", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    print(json.dumps(compile_one(**json.loads(args.one))))
    return
  if importlib.util.find_spec("libtpu") is None:
    sys.exit(
        "linear_schedule: libtpu must be installed, got none (pip install"
        " 'distilljax[plan]')"
    )
  table = []
  for chip in args.chip:
    row = measure(chip, args.kind, args.rows, args.vocab, args.width)
    table.append(row)
    print(
        f"{chip} {args.kind}, 1e6 bundles: bound {row['bound']:.0f}; chunks"
        f" {row['products']:.0f} + {row['streams']:.0f} = {row['xla']:.0f} (the"
        f" compiler's guess {row['guess']:.0f}), {row['temporaries']:,} B;"
        f" kernel {row['kernel_products']:.0f} + {row['kernel_sums']:.0f} ="
        f" {row['kernel']:.0f}, {row['kernel_temporaries']:,} B;"
        f" {row['ratio']:.2f} x",
        flush=True,
    )
  if args.json:
    with open(args.json, "w", encoding="utf-8") as f:
      json.dump(table, f, indent=2)


if __name__ == "__main__":
  main()
