"""The compiled schedule of the TPU kernels, without a TPU.

python -m benchmarks.kernel_schedule [--chip v5e,v5p,v6e] [--kernel fused,...]
    [--tile 512x1024,...] [--causal] [--width 128] [--json FILE]

Needs the extra `plan` (a TPU compiler). The compiler writes down which unit
does what in every bundle of instructions of one grid step, the part that only
the first or the last step of a row runs included. A column of the table is the
least number of bundles that one unit alone would need; the largest is what
binds. These are issue slots, not time: waiting for memory or for a result is
not in them. Compare kernels by them, do not turn them into milliseconds.

`jax` is `jax.experimental.pallas.ops.tpu.flash_attention`, forward only. One
fresh process and a temporary folder for each setting.
"""

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from distilljax.kernels.jvp_attention import tpu_bounds
from distilljax.plan import chips

LOW = "bfloat16"
# Names of kernels; a backward is compiled as a pair, rows and columns.
KERNELS = (
    "forward", "jax", "fused", "fused_q", "tangent", "backward",
    "second_backward",
)  # fmt: skip
UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE")
SPILLS, FILLS = "VSTORE:SPILL", "VLOAD:FILL"


def operands(
    kernel: str, n: int, width: int, heads: int = 4, kv_heads: int = 4,
    module: Any = None,
) -> tuple[Any, list[tuple[tuple[int, ...], str]]]:
  """One of our kernels and what it takes.

  Args:
    kernel: its name.
    n: rows and columns.
    width: of a head.
    heads: query heads.
    kv_heads: key heads.
    module: where the kernels are, None for those of TPUs.

  Returns:
    (function of a spec and arrays, (shape, dtype) of the arrays).
  """
  if module is None:
    from distilljax.kernels.jvp_attention import pallas_tpu as module

  q = ((1, heads, n, width), LOW)
  kv = ((1, kv_heads, n, width), LOW)
  rows = ((1, heads, n), "float32")
  x = [q, kv, kv]
  after = lambda fn, *letters: lambda spec, *a: fn(spec, *letters, *a)
  return {
      "forward": (module.forward, x),
      "fused": (after(module.fused, "qkv"), x + x),
      "fused_q": (after(module.fused, "q"), [*x, q]),
      "tangent": (after(module.tangent, "qkv"), [*x, q, rows, *x]),
      "backward": (after(module.backward, "qkv"), [*x, q, rows, q, rows]),
      "second_backward": (
          after(module.second_backward, "qkv", "qkv"),
          [*x, q, rows, *x, q, rows],
      ),
  }[kernel]


def _flash(tile, width, causal):
  """JAX's own forward kernel with blocks of one size."""
  from jax.experimental.pallas.ops.tpu import flash_attention as lib

  rows, columns = tile
  blocks = lib.BlockSizes(
      block_q=rows, block_k_major=columns, block_k=columns, block_b=1
  )
  return functools.partial(
      lib.flash_attention,
      causal=causal,
      sm_scale=width**-0.5,
      block_sizes=blocks,
  )


def shapes(chip: str, *sizes: tuple[tuple[int, ...], Any]) -> list[Any]:
  """Abstract arrays on one device of a chip that is not here.

  Args:
    chip: a key of `tpu_bounds.TOPOLOGIES`.
    *sizes: (shape, dtype) of the arrays.

  Returns:
    `jax.ShapeDtypeStruct`s.
  """
  import jax
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  mesh = Mesh(np.asarray(devices(chip)[:1]), ("x",))
  sharding = NamedSharding(mesh, PartitionSpec())
  return [jax.ShapeDtypeStruct(s, d, sharding=sharding) for s, d in sizes]


def devices(chip: str) -> Any:
  """The devices of a chip's topology; no device is needed.

  Args:
    chip: a key of `tpu_bounds.TOPOLOGIES`.
  """
  return chips.devices(tpu_bounds.TOPOLOGIES[chip])


def compile_one(
    chip: str,
    kernel: str,
    tile: tuple[int, int] | None,
    causal: bool,
    width: int,
    length: int,
) -> list[int]:
  """Compiles a setting in this process.

  Args:
    chip: a key of `tpu_bounds.TOPOLOGIES`.
    kernel: one of `KERNELS`.
    tile: rows and columns of a block, None for the table's.
    causal: whether later columns are hidden.
    width: of a head.
    length: rows and columns.

  Returns:
    The rows and columns of a block.
  """
  import jax

  from distilljax.kernels.jvp_attention import pallas_tpu
  from distilljax.kernels.jvp_attention import spec as spec_lib

  sizes = pallas_tpu.tile(width, 2, causal=causal)
  tile = tile or (sizes.rows, sizes.columns)
  if kernel == "jax":
    fn = _flash(tile, width, causal)
    sizes = [((1, 4, length, width), LOW)] * 3
  else:
    spec = spec_lib.Spec(
        "pallas_tpu", width**-0.5, causal, rows=tile[0], columns=tile[1]
    )
    fn, sizes = operands(kernel, length, width)
    fn = functools.partial(fn, spec)
  jax.jit(fn).lower(*shapes(chip, *sizes)).compile()
  return list(tile)


def read_schedules(folder: pathlib.Path) -> dict[str, dict[str, int]]:
  """What the compiler wrote down about our kernels and JAX's own.

  Args:
    folder: where it was told to dump.

  Returns:
    {kernel: {"bundles" or a unit's name: number}}.
  """
  found = {}
  for name, row in all_schedules(folder).items():
    ours = re.match(r"(?:jvp_attention_)?(\w+)", name)
    if re.search("jvp_attention|flash", name):
      found["jax" if "flash" in name else ours.group(1)] = row
  return found


def all_schedules(folder: pathlib.Path) -> dict[str, dict[str, int]]:
  """What the compiler wrote down about every kernel and fusion.

  Args:
    folder: where it was told to dump.

  Returns:
    {name in the program: {"bundles" or a unit's name: number}}.
  """
  found = {}
  for path in sorted(folder.glob("*-schedule-analysis_final_bundles.txt")):
    text = path.read_text(encoding="utf-8")
    bundles = re.search(r"non empty scheduled bundles:\s*(\d+)", text)
    stem = re.split(r"-\d+-schedule", path.name)[0]
    uses = list(
        folder.glob(f"{stem}-*-final_hlo-static-per-bundle-utilization.txt")
    )
    if bundles is None or not uses:
      continue
    (use,) = uses
    lines = use.read_text(encoding="utf-8").splitlines()
    units = [unit.strip() for unit in lines[1].split(",")]
    room = [int(number) for number in lines[2].split()]
    table = [
        [int(number) for number in line.split()]
        for line in lines[3:]
        if re.fullmatch(r"[\d\s]+", line)
    ]
    totals = [sum(column) for column in zip(*table)]
    row = {"bundles": int(bundles.group(1))}
    for unit, total, capacity in zip(units, totals, room):
      # Spills are counted, the others are the bundles that they need.
      row[unit] = total if ":" in unit else -(-total // capacity)
    found[stem.partition("-")[2]] = row
  return found


def measure(chip: str, kernel: str, **setting: Any) -> list[dict[str, Any]]:
  """Compiles a setting in a process of its own and reads its schedule.

  Args:
    chip: a key of `tpu_bounds.TOPOLOGIES`.
    kernel: one of `KERNELS`.
    **setting: see `compile_one`.

  Returns:
    One row for each kernel in it.

  Raises:
    RuntimeError: the compiler refused; its last line.
  """
  with tempfile.TemporaryDirectory() as folder:
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    environment = {**os.environ, **chips.ENVIRONMENT, "LIBTPU_INIT_ARGS": flags}
    call = json.dumps({"chip": chip, "kernel": kernel, **setting})
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_schedule", "--one", call],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
      lines = [a for a in done.stderr.splitlines() if re.match(r"\w.*: ", a)]
      text = (lines or ["no reason given"])[-1][:200]
      tile = "x".join(map(str, setting["tile"] or ()))
      raise RuntimeError(f"{chip} {kernel} {tile}: {text}")
    tile = json.loads(done.stdout.splitlines()[-1])
    found = read_schedules(pathlib.Path(folder))
    seconds = time.perf_counter() - start
  area = tile[0] * tile[1] / 512**2
  rows = []
  for name, numbers in found.items():
    bound = max(UNITS, key=lambda unit: numbers[unit])
    rows.append({
        "chip": chip,
        "kernel": kernel if name == "fused" else name,
        "tile": tile,
        "per_512x512": numbers["bundles"] / area,
        "binding": bound,
        "share": numbers[bound] / numbers["bundles"],
        "seconds": seconds,
        **numbers,
    })  # fmt: skip
  return rows


def line(row: dict[str, Any]) -> str:
  """A row of the table."""
  tile = "x".join(map(str, row["tile"]))
  units = " ".join(f"{row[unit]:6d}" for unit in UNITS)
  return (
      f"{row['chip']:>4s} {row['kernel']:<17s} {tile:>9s} {row['bundles']:7d}"
      f" {row['per_512x512']:8.0f} {units} {row[SPILLS]:6d} {row[FILLS]:6d}"
      f" {row['binding']:>7s} {row['share']:6.1%}"
  )


def _list(text):
  return text.split(",")


def _tiles(text):
  tiles = []
  for tile in _list(text):
    sides = [int(a) if a.isdigit() else 0 for a in tile.split("x")]
    if len(sides) != 2 or any(side < 1 or side % 128 for side in sides):
      raise argparse.ArgumentTypeError(
          f"must be rows x columns, as 512x1024, multiples of 128, got {tile}"
      )
    tiles.append(sides)
  return tiles


def _known(parser, flag, given, names):
  for name in given:
    if name not in names:
      parser.error(f"--{flag} must be of {', '.join(names)}, got {name}")


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chip", type=_list, default=["v5e"])
  parser.add_argument("--kernel", type=_list, default=list(KERNELS))
  parser.add_argument("--tile", type=_tiles, default=[None])
  parser.add_argument("--causal", action="store_true")
  parser.add_argument("--width", type=int, default=128)
  parser.add_argument("--length", type=int, default=4096)
  parser.add_argument("--json", help="file for the table")
  parser.add_argument("--one", help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  if args.one:
    print(json.dumps(compile_one(**json.loads(args.one))))
    return
  if importlib.util.find_spec("libtpu") is None:
    sys.exit(
        "kernel_schedule: libtpu must be installed, got none (pip install"
        " 'distilljax[plan]')"
    )
  _known(parser, "kernel", args.kernel, KERNELS)
  _known(parser, "chip", args.chip, tpu_bounds.TOPOLOGIES)
  settings = [
      (chip, kernel, tile)
      for chip in args.chip for kernel in args.kernel for tile in args.tile
  ]  # fmt: skip
  print(
      f"{'chip':>4s} {'kernel':<17s} {'tile':>9s} {'bundles':>7s}"
      f" {'/512x512':>8s} {' '.join(f'{unit:>6s}' for unit in UNITS)}"
      f" {'spills':>6s} {'fills':>6s} {'binding':>7s} {'share':>6s}"
  )
  rows, failed = [], False
  for i, (chip, kernel, tile) in enumerate(settings):
    progress = f"{i + 1}/{len(settings)} {chip} {kernel}"
    print(f"{progress:30s}", end="\r", file=sys.stderr, flush=True)
    try:
      new = measure(
          chip,
          kernel,
          tile=tile,
          causal=args.causal,
          width=args.width,
          length=args.length,
      )
    except RuntimeError as error:
      failed = True
      print(f"\nkernel_schedule: {error}", file=sys.stderr)
      continue
    rows += new
    for row in new:
      print(line(row), flush=True)
  if args.json:
    with open(args.json, "w", encoding="utf-8") as f:
      json.dump(rows, f, indent=2)
  if failed:
    sys.exit(1)


if __name__ == "__main__":
  main()
