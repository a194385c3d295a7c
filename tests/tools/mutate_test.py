"""The mutation check on a toy: it must kill what is tested, and only that."""

import os
import pathlib
import subprocess
import sys
import textwrap

from tests.tools import mutate

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE = '''
"""A module."""

FACTOR = 2.0


def double(x: "1 + 1", *, shift=True):
  """Doubles 1 + 1."""
  if x is None:
    raise ValueError(f"{1 + 1}")
  return FACTOR * x + 1 if shift else -x


def never_called(x):
  return x + 1
'''
TEST = """
import pytest

from toy import maths


def test_double():
  assert maths.double(3.0) == 7.0


def test_none():
  with pytest.raises(ValueError):
    maths.double(None)
"""
DRIVER = """
import pathlib, sys
from tests.tools import mutate

root = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(root))
checker = mutate.Checker(root, {"toy.maths": ("maths_test.py",)}, root, 60)
mutants = checker.mutants()
checker.prepare(log=lambda *_: None)
listed = {m.name: "listed" for m in mutants if m.replacement == "x"}
for fresh in (False, False):
  lines = []
  (result,) = mutate.check(
      checker, mutants, listed, 2, fresh=fresh, log=lines.append
  ).values()
  for mutant in result.survivors:
    print("alive:", mutant.original, "->", mutant.replacement)
  print("killed:", result.killed, "of", len(mutants) - result.equivalent)
  print("run:", sum(" CPU s, " in line for line in lines))
"""


def _named(source: str) -> list[str]:
  found = mutate.mutants_of("toy", textwrap.dedent(source).encode())
  return [f"{m.original} -> {m.replacement}" for m in found]


def _changed(source: str) -> list[str]:
  data = textwrap.dedent(source).encode()
  return [m.apply(data).decode() for m in mutate.mutants_of("toy", data)]


def test_operators():
  assert _named("a = x - y") == ["x - y -> x + y"]
  assert _named("a = x * y") == ["x * y -> x / y", "x * y -> x", "x * y -> y"]
  assert _named("a = -x") == ["-x -> x"]
  assert _named("a = f(b=True)") == ["True -> False"]
  assert _named("a = x < y") == ["x < y -> x <= y", "x < y -> x >= y"]
  assert _named("a = jnp.sin(x)") == ["jnp.sin(x) -> jnp.cos(x)"]
  assert _named("a = jnp.sum(x)") == ["jnp.sum(x) -> jnp.mean(x)"]
  assert _named("a = jnp.maximum(x, y)") == [
      "jnp.maximum(x, y) -> jnp.minimum(x, y)"
  ]
  assert _named("a = jax.lax.stop_gradient(x)") == [
      "jax.lax.stop_gradient(x) -> x"
  ]
  assert _named("a = jnp.where(c, x, y)") == [
      "jnp.where(c, x, y) -> x",
      "jnp.where(c, x, y) -> y",
  ]
  assert _named("_checks.finite(fn, x=x)") == [
      "_checks.finite(fn, x=x) -> None"
  ]
  assert _named("a = (0, 0.0, 3, 1e-6)") == [
      "0 -> 1", "0.0 -> 1.0", "3 -> 4", "1e-06 -> 2e-06"
  ]  # fmt: skip


def test_what_is_not_code_is_left_alone():
  assert not _named('"""Adds 1 + 1."""')
  assert not _named('Kind = Literal[1, 2]')
  assert not _named('raise ValueError("a" + f"{1 + 1}")')
  assert not _named('def f(x: A[1 + 1]) -> B[1]:\n  """1 + 1."""\n')


def test_precedence_survives_the_change():
  assert "a = (x - y) * z\n" in [
      s.replace("((x - y))", "(x - y)") for s in _changed("a = (x + y) * z\n")
  ]
  assert "a = 2 * (x + y)\n" in _changed("a = 2 * stop_gradient(x + y)\n")
  assert "a = 'é' + (x + y)\n" in _changed("a = 'é' + -(x + y)\n")


def test_kills_what_is_tested_and_reports_the_rest(tmp_path):
  (tmp_path / "toy").mkdir()
  (tmp_path / "toy/__init__.py").write_text("")
  (tmp_path / "toy/maths.py").write_text(SOURCE)
  (tmp_path / "maths_test.py").write_text(TEST)
  done = subprocess.run(
      [sys.executable, "-c", DRIVER, str(tmp_path)],
      cwd=ROOT,
      env={**os.environ, "PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  # Nobody calls that function. (-x is not tested either, but -x -> x is listed,
  # and so is FACTOR * x -> x.) The rest: 2.0, True, is, +, two of *, 1, shift.
  total = 10
  verdicts = ["alive: x + 1 -> x - 1", "alive: 1 -> 2"]
  verdicts.append(f"killed: {total - 2} of {total}")
  # The second run knows the verdicts of the first.
  assert done.stdout.strip().splitlines() == [
      *verdicts, f"run: {total}", *verdicts, "run: 0"
  ]


def test_equivalent_list(tmp_path):
  path = tmp_path / "list.txt"
  path.write_text("# why\n\na | f | x -> y | same | because\n")
  assert mutate.read_equivalent(path) == {"a | f | x -> y | same": "because"}
  known = {
      m.name
      for module in (
          *mutate.MODULES,
          *(f"tests.golden_readers.{name}" for name in mutate.READERS),
      )
      for m in mutate.mutants_of(
          module, (ROOT / (module.replace(".", "/") + ".py")).read_bytes()
      )
  }
  gone = set(mutate.read_equivalent(mutate.EQUIVALENT)) - known
  assert not gone, f"listed, but the code has changed: {sorted(gone)}"
