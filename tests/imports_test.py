"""Who may import what, what an import may touch, and what a docstring says.

The order of the floors stands in `docs/floors.md`; here it is a table that the
syntax trees of all modules are held against.
"""

import ast
import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import distilljax
from distilljax import methods

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = ROOT / "distilljax"

# From the bottom up; a package may import itself and what stands in lower rows.
# Packages of one row do not import each other.
FLOORS = (
    ("_checks", "typing"),
    ("losses", "processes", "kernels"),
    ("oracles",),
    ("lm",),
    ("models",),
    ("teachers", "data", "evals", "io"),
    ("plan",),
    ("train",),
    ("methods",),
)
# The packages that a user may lift out: what else they may import.
LIFTED = ("losses", "processes", "kernels", "oracles")
LIFTED_THIRD_PARTY = {"jax", "numpy", "jaxtyping"}
METHOD_THIRD_PARTY = LIFTED_THIRD_PARTY | {"optax"}
# Importing these costs seconds, or configures the process.
NEVER_AT_MODULE_LEVEL = {
    "absl", "matplotlib", "tensorflow", "tensorflow_datasets", "transformers",
}
NEVER = {"tensorflow", "transformers"}
# Reached through a function of their own, never needed by a loss.
BARE = {
    "distilljax", "jax", "jaxlib", "numpy", "jaxtyping",
    # What jax and jaxtyping need themselves.
    "ml_dtypes", "opt_einsum", "scipy", "wadler_lindig",
}


def modules():
  return sorted(LIBRARY.rglob("*.py"))


def package(path):
  """losses, train, ...; `__init__` and `_checks` are packages of one file."""
  return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imports(path):
  """(dotted name, is at module level) of everything a file imports.

  `from a import b` gives a.b: b may be a module.
  """
  def visit(node, level):
    for child in ast.iter_child_nodes(node):
      if isinstance(child, ast.Import):
        yield from ((alias.name, level) for alias in child.names)
      elif isinstance(child, ast.ImportFrom):
        assert not child.level, f"{path}: relative import"
        for alias in child.names:
          yield f"{child.module}.{alias.name}", level
      function = isinstance(
          child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
      )
      yield from visit(child, level and not function)

  yield from visit(ast.parse(path.read_text()), True)


def allowed_packages(name):
  """The packages of the library that `name` may import."""
  if name == "__init__":  # of the library: everything else is loaded when used
    return {"_checks"}
  below = set()
  for row in FLOORS:
    if name in row:
      break
    below |= set(row)
  else:
    raise AssertionError(f"distilljax.{name} stands on no floor")
  if name in FLOORS[0]:
    return {name}
  if name in FLOORS[1]:
    return below | {name}
  if name == "oracles":
    return {*FLOORS[0], "processes", name}
  return below | {name}


@pytest.mark.parametrize(
    "path", modules(), ids=lambda p: str(p.relative_to(LIBRARY))
)
def test_no_module_imports_upward(path):
  mine = package(path)
  for name, at_module_level in imports(path):
    first, *rest = name.split(".")
    if first == "distilljax":
      assert rest and rest[0] in allowed_packages(mine), (
          f"distilljax.{mine} imports {name}: imports go down only"
      )
      if mine == "methods" and rest[0] == "methods":
        assert rest[1].startswith("_"), f"a method imports another: {name}"
      continue
    assert first not in NEVER, f"{name} has no place in the library"
    assert not (at_module_level and first in NEVER_AT_MODULE_LEVEL), (
        f"{name} is imported at module level"
    )
    if first in sys.stdlib_module_names:
      continue
    if mine in (*LIFTED, "_checks", "typing"):
      assert first in LIFTED_THIRD_PARTY, f"{mine} imports {name}"
    if mine == "methods":
      assert first in METHOD_THIRD_PARTY, f"a method imports {name}"


def test_the_rule_sees_every_form_of_import(tmp_path):
  path = tmp_path / "x.py"
  path.write_text(
      "import a\nif a:\n  import b.c as d\nfrom e.f import g\n"
      "def h():\n  from i import j\nclass K:\n  import l\n"
  )
  assert list(imports(path)) == [
      ("a", True), ("b.c", True), ("e.f.g", True), ("i.j", False), ("l", True),
  ]
  assert "train" not in allowed_packages("losses")
  assert "processes" not in allowed_packages("losses")
  assert "evals" not in allowed_packages("data")
  assert "losses" not in allowed_packages("oracles")
  assert {"losses", "train", "_checks"} < allowed_packages("methods")


def run_fresh(code, **environment):
  return subprocess.run(
      [sys.executable, "-c", code],
      env={
          **{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
          "PYTHONPATH": str(ROOT), **environment,
      },
      capture_output=True, text=True, timeout=300, check=False,
  )


# As if nothing else were installed: the module is not found.
BLOCKER = """
import importlib.machinery
import sys

class Only:
  def find_distributions(self, *args, **kwargs):  # versions are read so
    return importlib.machinery.PathFinder.find_distributions(*args, **kwargs)

  def __init__(self, finders):
    self.finders = finders

  def find_spec(self, name, path=None, target=None):
    first = name.split(".")[0]
    if first.startswith("_sysconfigdata"):  # the standard library's, unlisted
      first = "sys"
    if first not in {allowed} and first not in sys.stdlib_module_names:
      return None
    specs = (f.find_spec(name, path, target) for f in self.finders)
    return next((s for s in specs if s is not None), None)

sys.meta_path[:] = [Only(list(sys.meta_path))]
"""


def test_losses_processes_and_kernels_need_only_jax_numpy_and_jaxtyping():
  code = BLOCKER.format(allowed=BARE) + """
import distilljax.losses, distilljax.processes, distilljax.kernels
import distilljax.oracles
foreign = sorted(
    {name.split(".")[0] for name in sys.modules}
    & {"flax", "optax", "orbax", "grain", "einops", "chex", "absl", "tqdm",
       "ml_collections", "matplotlib"}
)
assert not foreign, foreign
import jax.numpy as jnp
logits = jnp.array([[0.0, 1.0]])
print(float(distilljax.losses.forward_kl(logits, logits)[0]))
for name in ("flax", "optax", "orbax", "distilljax.train"):
  try:
    __import__(name)
  except ModuleNotFoundError:
    pass
  else:
    raise AssertionError(name + " is there")
"""
  done = run_fresh(code)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == "0.0"


def test_no_import_touches_a_backend():
  # A platform that does not exist: whatever asks JAX for a device fails.
  code = """
import jax
import distilljax
from distilljax import (
    data, evals, kernels, lm, losses, methods, models, oracles, processes, train
)
for slug in methods.names():
  methods.get(slug)
try:
  jax.devices()
except RuntimeError as e:
  print("no backend until here:", "nowhere" in str(e))
"""
  done = run_fresh(code, JAX_PLATFORMS="nowhere")
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == "no backend until here: True"


def test_import_distilljax_loads_nothing_heavy():
  code = """
import sys
import jax
before = set(sys.modules)
import distilljax
print(sorted(m for m in set(sys.modules) - before if "distilljax" not in m))
print(sorted(m for m in sys.modules if m.startswith("distilljax")))
"""
  done = run_fresh(code)
  assert done.returncode == 0, done.stderr
  new, ours = map(ast.literal_eval, done.stdout.splitlines())
  third_party = {m.split(".")[0] for m in new} - sys.stdlib_module_names
  assert not third_party
  assert ours == ["distilljax", "distilljax._checks"]


def test_every_subpackage_is_listed_and_loads_when_it_is_asked_for():
  folders = {
      m.name for m in pkgutil.iter_modules(distilljax.__path__) if m.ispkg
  }
  assert folders - {"io"} == set(distilljax.__all__) - {"__version__", "debug"}
  assert set(dir(distilljax)) == set(distilljax.__all__)
  with pytest.raises(AttributeError, match="no attribute 'lozzes'"):
    distilljax.lozzes  # noqa: B018


# --- docstrings ----------------------------------------------------------

# Reductions, plain metrics and bookkeeping, which are nobody's paper.
NO_PAPER = {
    "losses.absolute_distance", "losses.entropy", "losses.masked_mean",
    "losses.masked_sum_and_count", "losses.max_distance",
    "losses.squared_distance",
}
DOCUMENTED = (
    "losses", "processes", "oracles", "evals", "models", "data", "train",
    "kernels", "lm", "plan",
)


def public():
  """(qualified name, object) of every public function and class."""
  found = {}
  for name in DOCUMENTED:
    module = importlib.import_module(f"distilljax.{name}")
    for symbol in getattr(module, "__all__", ()):
      thing = getattr(module, symbol)
      if inspect.isfunction(thing) or inspect.isclass(thing):
        found[f"{name}.{symbol}"] = thing
  for symbol in ("names", "get"):
    found[f"methods.{symbol}"] = getattr(methods, symbol)
  for slug in methods.names():
    found[f"methods.{slug}.make"] = methods.get(slug).make
  return found


def sections(docstring):
  """{"Args": text, ...} of a docstring in Google form."""
  parts = re.split(
      r"^(Args|Returns|Raises|Example|Examples|References|Attributes|Yields):"
      r"[ \t]*",
      inspect.cleandoc(docstring), flags=re.MULTILINE,
  )
  return dict(zip(parts[1::2], parts[2::2]))


def problems(name, thing):
  """What the docstring of a public function or class lacks."""
  doc = thing.__doc__
  if not doc or not doc.strip():
    return [f"{name}: no docstring"]
  out = []
  if inspect.isclass(thing):
    for key, member in vars(thing).items():
      method = inspect.isfunction(member) or isinstance(member, property)
      if method and key[0] != "_" and not inspect.getdoc(getattr(thing, key)):
        out.append(f"{name}.{key}: no docstring")
    return out
  signature = inspect.signature(thing)
  has = sections(doc)
  for argument in signature.parameters:
    if not re.search(
        rf"^\s+(\*{{0,2}}\w+, )*\*{{0,2}}{argument}(, \*{{0,2}}\w+)*:",
        "\n" + has.get("Args", ""), re.MULTILINE,
    ):
      out.append(f"{name}: Args does not explain {argument}")
  returns = signature.return_annotation not in (None, "None")
  if signature.parameters and returns and not has.get("Returns", "").strip():
    out.append(f"{name}: no Returns")
  paper = name.startswith("losses.") and name not in NO_PAPER
  if paper and not has.get("References", "").strip():
    out.append(f"{name}: no References")
  return out


def test_docstrings():
  found = [p for name, thing in public().items() for p in problems(name, thing)]
  assert not found, "\n".join(found)


def test_the_docstring_rule_finds_what_is_missing():
  def good(x, *, n):
    """One line.

    Args:
      x: array.
      n: number.

    Returns:
      An array.

    References:
      Somebody.
    """

  def bare(x):
    """One line."""

  assert problems("losses.good", good) == []
  assert problems("losses.bare", bare) == [
      "losses.bare: Args does not explain x",
      "losses.bare: no Returns",
      "losses.bare: no References",
  ]
  bare.__doc__ = None
  assert problems("losses.bare", bare) == ["losses.bare: no docstring"]
