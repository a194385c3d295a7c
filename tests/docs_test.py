"""Documentation that runs: README, worked example, docstrings, notebook."""

import doctest
import importlib.util
import json
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
# Nobody else's clock or cache decides what these print.
QUICK_DOCTESTS = (
    "losses", "processes", "kernels", "train", "oracles", "models", "lm",
    "plan",
)


def code(path):
  """The Python blocks of a page, joined; line numbers are those of the page."""
  text, out, inside = path.read_text(), [], False
  for line in text.splitlines():
    if line.startswith("```"):
      inside = line == "```python" and not inside
      line = "```"
    out.append(line if inside and line != "```" else "")
  return "\n".join(out)


def run_fresh(*command, **environment):
  """Runs a command as a user would: one device, no run-time type checks."""
  return subprocess.run(
      [sys.executable, *command],
      cwd=ROOT,
      env={
          **{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
          "PYTHONPATH": str(ROOT), **environment,
      },
      capture_output=True, text=True, check=False,
  )


def test_readme_example():
  lines = [line for line in code(ROOT / "README.md").splitlines() if line]
  assert len(lines) <= 12
  assert sum("distilljax" in line for line in lines) == 1
  names = {}
  exec(code(ROOT / "README.md"), names)
  start, _ = names["loss"](0 * names["params"])
  assert float(start) > 1.0
  assert abs(float(names["value"])) < 0.01


def test_adding_a_method(tmp_path):
  script = tmp_path / "example.py"
  script.write_text(
      code(DOCS / "adding_a_method.md")
      + "\nprint(method.name, one_step, teacher_step)\n"
  )
  done = run_fresh(script)
  assert done.returncode == 0, done.stderr
  name, one_step, teacher_step = done.stdout.split("\n")[-2].split()
  assert name == "semigroup"
  assert float(one_step) < 0.12  # one seed, measured .07
  assert float(teacher_step) > 3 * float(one_step)


def test_links_between_pages_lead_somewhere():
  broken = []
  for page in PAGES:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
      if not target.startswith("http") and not (page.parent / target).exists():
        broken.append(f"{page.relative_to(ROOT)}: {target}")
  assert PAGES
  assert not broken


def test_commands_name_files_that_exist():
  wrong = []
  for page in PAGES:
    for name in re.findall(r"configs/\w+\.py", page.read_text()):
      if not (ROOT / name).is_file():
        wrong.append(f"{page.relative_to(ROOT)}: {name}")
  assert not wrong


def documented_modules():
  for package in QUICK_DOCTESTS:
    module = importlib.import_module(f"distilljax.{package}")
    yield module.__name__
    for found in pkgutil.iter_modules(module.__path__, f"{module.__name__}."):
      yield found.name


@pytest.mark.parametrize(
    "name", [*documented_modules(), "distilljax._checks"]
)
def test_docstring_examples(name):
  result = doctest.testmod(
      importlib.import_module(name),
      optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
  )
  assert result.failed == 0, f"{result.failed} of {result.attempted} failed"


def test_the_collector_finds_docstring_examples():
  finder = doctest.DocTestFinder()
  found = [
      test.name
      for name in documented_modules()
      for test in finder.find(importlib.import_module(name))
      if test.examples
  ]
  assert "distilljax.losses.reduction.masked_mean" in found
  assert "distilljax.models.zoo.make" in found


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_as_committed(path):
  text = path.read_text()
  first, *rest = json.loads(text)["cells"]
  # One variable names where the package comes from; nothing else does.
  source = "".join(first["source"])
  assert first["cell_type"] == "code"
  assert len(re.findall(r"^SOURCE = \".+\"", source, re.MULTILINE)) == 1
  assert "http" not in text
  assert "pip" not in "".join("".join(cell["source"]) for cell in rest)
  assert len(text) < 300_000
  cells = [cell for cell in [first, *rest] if cell["cell_type"] == "code"]
  assert [cell["execution_count"] for cell in cells] == list(
      range(1, len(cells) + 1)
  )
  outputs = [output for cell in cells for output in cell["outputs"]]
  assert not [o for o in outputs if o["output_type"] == "error"]
  assert any("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
  import nbclient
  import nbformat

  notebook = nbformat.read(path, 4)
  client = nbclient.NotebookClient(
      notebook, timeout=900, kernel_name="python3",
      resources={"metadata": {"path": str(path.parent)}},
  )
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  client.execute(env={**environment, "PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_the_docs_build_without_a_warning(tmp_path):
  pytest.importorskip("sphinx", reason="needs the extra docs")
  done = run_fresh(
      "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs",
      tmp_path / "html", JAX_PLATFORMS="cpu",
  )
  assert done.returncode == 0, done.stderr
  for page in ("index", "floors", "adding_a_method", "api/losses"):
    assert (tmp_path / "html" / f"{page}.html").is_file()


def test_docstrings_become_what_they_say():
  spec = importlib.util.spec_from_file_location(
      "plain_docstrings", DOCS / "plain_docstrings.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  lines = [
      "One line: |a| * b of `x_`.", "", "With", "  x * y", "z:", "* one",
      "* two", "", "Args:", "  **hyper: a * b", "      deep", "",
      "Example:", "  >>> f(2 * 3)", "  6",
  ]
  assert module.convert(lines) == [
      "One line: \\|a\\| \\* b of ``x_``.", "", "With", "", "::", "",
      "  x * y", "", "z:", "", "* one", "* two", "", "Args:",
      "  **hyper: a \\* b", "    deep", "", "Example:", "  >>> f(2 * 3)", "  6",
      "",
  ]
