"""What the tests that compile for an H100 share; no GPU is needed."""

import dataclasses
import importlib.util
import pathlib
import re
import shutil
import subprocess
import tempfile

import jax
from jax.sharding import NamedSharding, PartitionSpec

from tests.kernels import aot


@dataclasses.dataclass(frozen=True)
class Resources:
  """What one kernel takes.

  Attributes:
    registers: of a thread.
    spilled: bytes of a thread that registers had no place for.
    tensor_cores: their instructions in its text.
  """

  registers: int
  spilled: int
  tensor_cores: int


def shapes(*sizes):
  """Abstract arrays on one H100, from (shape, dtype)."""
  sharding = NamedSharding(aot.mesh("h100:1", x=1), PartitionSpec())
  return [jax.ShapeDtypeStruct(s, d, sharding=sharding) for s, d in sizes]


def _assembler():
  """That of the wheel, which is the compiler's, or what is installed."""
  package = importlib.util.find_spec("nvidia.cuda_nvcc")
  if package is None:
    return shutil.which("ptxas")
  return pathlib.Path(package.submodule_search_locations[0]) / "bin/ptxas"


def compile_kernels(fn, *sizes):
  """(executable, {kernel's name: its resources}) of a function of arrays."""
  lowered = jax.jit(fn).lower(*shapes(*sizes))
  with tempfile.TemporaryDirectory() as folder:
    done = lowered.compile(compiler_options={"xla_dump_to": folder})
    found = {}
    for path in pathlib.Path(folder).glob("*.ptx"):
      if path.stat().st_size:  # there is one of constants, often of none
        found |= _resources(path)
  return done, found


def _resources(path):
  command = [_assembler(), "-v", "-arch=sm_90a", path, "-o", f"{path}.out"]
  out = subprocess.run(command, capture_output=True, text=True, check=True)
  text = path.read_text(encoding="utf-8")
  found = {}
  for part in out.stderr.split("Compiling entry function '")[1:]:
    entry = part.partition("'")[0]
    name = re.fullmatch(r"jvp_attention_(\w+?)(?:_\d+)?", entry)
    if name is None:
      continue
    body = text.partition(f".entry {entry}(")[2].partition(".entry ")[0]
    number = lambda pattern, part=part: int(re.search(pattern, part).group(1))
    found[name.group(1)] = Resources(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill st") + number(r"(\d+) bytes spill l"),
        len(re.findall(r"wgmma\.mma_async|mma\.sync", body)),
    )
  return found
