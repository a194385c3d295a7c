"""Mutation check: how many small faults in the library do its tests notice?

python -m tests.tools.mutate [module ...] [--sample N] [--seed S] [--jobs 2]
python -m tests.tools.mutate --readers --report docs/mutation_report.md

A mutant is one module with one fault: an operator, a sign, a comparison or a
constant changed, a stop_gradient, mask, weight or check dropped. It is killed
when a test fails (or hangs). Survivors are listed; those that no test could
kill, because the program is the same, stand in `equivalent_mutants.txt` with a
reason and are not counted. `--readers` adds the golden readers: a fault in one
must make its own golden test red.

How it is fast: this process imports everything but starts no backend, and forks
once a mutant; the child imports the mutated module and what depends on it, and
runs pytest inside itself until the first failure, compiling only programs that
the fault changed (the others come from a cache on disk). A first run with a
probe before every statement tells which tests reach which line, so that only
those run, likely killers first.

A run can be stopped and started again: verdicts are kept in `--cache`. One is
used again while the definition that holds the fault is unchanged and so is the
test that killed it (for a survivor: all files of its tests); `--fresh` asks for
all of them anew.
"""

import argparse
import ast
import builtins
import collections
import dataclasses
import gc
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import inspect
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence

HERE = pathlib.Path(__file__).resolve().parent
EQUIVALENT = HERE / "equivalent_mutants.txt"
SURVIVORS = HERE / "surviving_mutants.txt"
LOSSES = (
    "adversarial",
    "consistency",
    "distribution_matching",
    "feature",
    "flow_map",
    "reduction",
)
PROCESSES = ("guidance", "path", "samplers", "time")
MODULES = tuple(f"distilljax.losses.{m}" for m in LOSSES) + tuple(
    f"distilljax.processes.{m}" for m in PROCESSES
)
_READERS = "tests.golden_readers."
READERS = (
    "anyflow", "diff_instruct", "distillation_dpo", "dmd2_edm", "dmd2_sd",
    "ect", "fastgen_dmd2_step", "fastgen_losses", "fastgen_schedules",
    "flow_maps", "gdd", "ict", "mdt_dist", "meanflow", "phased_dmd", "rcm",
    "scm", "self_forcing", "sid", "vsd",
)  # fmt: skip
# What a reader says of itself: no code.
_TABLES = ("CALLS", "NOT_REPRODUCED", "TOLERANCE", "OPTIMISED")
# Beside a module's own tests (tests/<folder>/<module>_test.py): every file here
# whose tests reach the module.
SHARED_TESTS = ("tests/oracles/closed_form_test.py",)
GOLDEN = "tests/golden_test.py::test_golden[{}]"

_LONGEST = 3600  # seconds of a mutant, whatever it does
_SWAPPED_OPERATORS = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
_PAIRS = (
    ("sin", "cos"),
    ("sinh", "cosh"),
    ("min", "max"),
    ("minimum", "maximum"),
    ("sum", "mean"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("argmin", "argmax"),
    ("floor", "ceil"),
    ("log", "log1p"),
    ("exp", "expm1"),
    ("all", "any"),
    ("less", "less_equal"),
)
_SWAPPED_CALLS = {a: b for a, b in _PAIRS} | {b: a for a, b in _PAIRS}
# f(x, ...) -> x
_DROPPED_CALLS = (
    "stop_gradient", "psum", "pmean", "all_gather", "abs", "square", "sqrt",
    "clip", "at_least_float32",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One fault: `original` at bytes [start, end) becomes `replacement`."""

  module: str
  function: str
  statement: int
  line: int
  start: int
  end: int
  original: str
  replacement: str
  turn: int = 0  # among equal changes of the function

  @property
  def name(self) -> str:
    """What identifies it when lines move."""
    turn = f" #{self.turn}" if self.turn else ""
    return (
        f"{self.module.removeprefix('distilljax.')} | {self.function} |"
        f" {self.original} -> {self.replacement}{turn}"
    )

  def apply(self, source: bytes) -> bytes:
    """The module's source with the fault."""
    text = f"({self.replacement})" if self.function else ""
    return source[: self.start] + text.encode() + source[self.end :]


class _Finder(ast.NodeVisitor):
  """Collects the mutants of one module."""

  def __init__(self, module: str, source: bytes):
    self._module = module
    starts = [0]
    for text in source.splitlines(keepends=True):
      starts.append(starts[-1] + len(text))
    self._line_starts = starts
    self._function: list[str] = []
    self._statement = 0
    self.found: list[Mutant] = []

  def _add(self, node: ast.AST, new: ast.AST | str) -> None:
    text = new if isinstance(new, str) else ast.unparse(new)
    original = ast.unparse(node)
    if text == original:
      return
    function = ".".join(self._function) or "<module>"
    same = [
        m
        for m in self.found
        if (m.function, m.original, m.replacement) == (function, original, text)
    ]
    self.found.append(
        Mutant(
            self._module,
            function,
            self._statement,
            node.lineno,
            self._line_starts[node.lineno - 1] + node.col_offset,
            self._line_starts[node.end_lineno - 1] + node.end_col_offset,
            original,
            text,
            len(same),
        )
    )

  def visit(self, node: ast.AST) -> None:
    if isinstance(node, ast.stmt):
      outer, self._statement = self._statement, node.lineno
      super().visit(node)
      self._statement = outer
    else:
      super().visit(node)

  # What is not code: annotations, text, docstrings.
  def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
    self._function.append(node.name)
    for default in (*node.args.defaults, *node.args.kw_defaults):
      if default is not None:
        self.visit(default)
    for statement in node.body:
      self.visit(statement)
    self._function.pop()

  def visit_ClassDef(self, node: ast.ClassDef) -> None:
    self._function.append(node.name)
    for statement in node.body:
      self.visit(statement)
    self._function.pop()

  def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
    if node.value is not None:
      self.visit(node.value)

  def visit_Assign(self, node: ast.Assign) -> None:
    alias = not self._function and isinstance(node.value, ast.Subscript)
    table = self._module.startswith(_READERS) and any(
        isinstance(t, ast.Name) and t.id in _TABLES for t in node.targets
    )
    if not alias and not table:  # a type, such as Literal["sum", "mean"]
      self.visit(node.value)

  def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
    pass

  def visit_Raise(self, node: ast.Raise) -> None:
    pass

  def visit_Expr(self, node: ast.Expr) -> None:
    if _is_check(node.value):
      self._add(node.value, "None")
    self.visit(node.value)

  # Code.
  def visit_Constant(self, node: ast.Constant) -> None:
    value = node.value
    if isinstance(value, bool):
      self._add(node, ast.Constant(not value))
    elif isinstance(value, int):
      self._add(node, ast.Constant(value + 1))
    elif isinstance(value, float):
      self._add(node, ast.Constant(2 * value if value else 1.0))

  def visit_BinOp(self, node: ast.BinOp) -> None:
    for kind in _SWAPPED_OPERATORS.get(type(node.op), ()):
      self._add(node, ast.BinOp(node.left, kind(), node.right))
    if isinstance(node.op, ast.Mult):
      for kept in (node.left, node.right):
        if not isinstance(kept, ast.Constant):
          self._add(node, kept)
    self.generic_visit(node)

  def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
    if isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
      self._add(node, node.operand)
    self.generic_visit(node)

  def visit_Compare(self, node: ast.Compare) -> None:
    for i, op in enumerate(node.ops):
      for kind in _SWAPPED_OPERATORS.get(type(op), ()):
        ops = [*node.ops[:i], kind(), *node.ops[i + 1 :]]
        self._add(node, ast.Compare(node.left, ops, node.comparators))
    self.generic_visit(node)

  def visit_BoolOp(self, node: ast.BoolOp) -> None:
    (kind,) = _SWAPPED_OPERATORS[type(node.op)]
    self._add(node, ast.BoolOp(kind(), node.values))
    self.generic_visit(node)

  def _condition(self, node: ast.If | ast.IfExp) -> None:
    if not isinstance(node.test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
      self._add(node.test, ast.UnaryOp(ast.Not(), node.test))
    self.generic_visit(node)

  visit_If = _condition
  visit_IfExp = _condition

  def visit_Call(self, node: ast.Call) -> None:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if isinstance(node.func, ast.Name):
      name = node.func.id
    if _is_check(node) and name == "fail":
      return  # its arguments are text
    if name == "where" and len(node.args) == 3:
      self._add(node, node.args[1])
      self._add(node, node.args[2])
    if name in _DROPPED_CALLS and node.args:
      self._add(node, node.args[0])
    if name in _SWAPPED_CALLS:
      other = _SWAPPED_CALLS[name]
      func = (
          ast.Attribute(node.func.value, other, ast.Load())
          if isinstance(node.func, ast.Attribute)
          else ast.Name(other, ast.Load())
      )
      self._add(node, ast.Call(func, node.args, node.keywords))
    self.generic_visit(node)


def _is_check(node: ast.AST) -> bool:
  return (
      isinstance(node, ast.Call)
      and isinstance(node.func, ast.Attribute)
      and isinstance(node.func.value, ast.Name)
      and node.func.value.id == "_checks"
  )


def mutants_of(module: str, source: bytes) -> list[Mutant]:
  """All mutants of a module's source, in the order of its lines."""
  finder = _Finder(module, source)
  for statement in ast.parse(source).body:
    finder.visit(statement)
  return finder.found


def _probe(module: str, source: bytes) -> bytes:
  """The source with a call before every statement of a function."""
  tree = ast.parse(source)

  def instrument(body: list[ast.stmt]) -> list[ast.stmt]:
    out = []
    for i, statement in enumerate(body):
      docstring = i == 0 and (
          isinstance(statement, ast.Expr)
          and isinstance(statement.value, ast.Constant)
      )
      if not docstring:
        call = f"__mutate_hit__({module!r}, {statement.lineno})"
        out.append(ast.parse(call).body[0])
      out.append(statement)
    return out

  for node in ast.walk(tree):
    if isinstance(node, (ast.Module, ast.ClassDef, ast.Lambda, ast.IfExp)):
      continue
    for field in ("body", "orelse", "finalbody"):
      if getattr(node, field, None):
        setattr(node, field, instrument(getattr(node, field)))
  return ast.unparse(ast.fix_missing_locations(tree)).encode()


class _Injector:
  """A finder that gives some modules another source, typed as in the tests."""

  def __init__(self, sources: dict[str, bytes]):
    self._sources = sources

  def find_spec(self, name, path=None, target=None):
    if name not in self._sources:
      return None
    for finder in sys.meta_path:
      if isinstance(finder, _Injector):
        continue
      spec = finder.find_spec(name, path, target)
      if spec is not None:
        break
    kind, source = type(spec.loader), self._sources[name]

    class Loader(kind):

      def get_code(self, fullname):
        return self.source_to_code(source, self.get_filename(fullname))

    loader = object.__new__(Loader)
    loader.__dict__.update(vars(spec.loader))
    spec.loader = loader
    return spec


def _dependents(module: str, package: str) -> set[str]:
  """Loaded modules of the package that hold something of `module`."""
  gone = {module}
  while True:
    more = {
        name
        for name, loaded in list(sys.modules.items())
        if name.split(".")[0] == package and name not in gone
        for value in list(vars(loaded).values())
        if (
            inspect.ismodule(value)
            and value.__name__ in gone
            or getattr(value, "__module__", None) in gone
        )
    }
    if not more:
      return gone
    gone |= more


class _Plugin:
  """Orders the tests, stops hypothesis from shrinking, names the killer."""

  def __init__(
      self,
      ranks: dict[str, int] | None,
      report: pathlib.Path,
      injector: _Injector,
  ):
    self._ranks = ranks
    self._injector = injector
    self._report = report
    self._failed: list[str] = []
    self.tests: dict[str, dict] = {}
    self.hits: set = set()
    self.at_import: set = set()

  def pytest_sessionstart(self, session):
    # After conftest.py, whose hook (the type checks) would go before.
    sys.meta_path.insert(0, self._injector)
    try:
      import hypothesis  # pylint: disable=g-import-not-at-top
    except ImportError:
      return
    hypothesis.settings.register_profile(
        "mutate",
        hypothesis.settings.default,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )
    hypothesis.settings.load_profile("mutate")

  def pytest_collection_modifyitems(self, session, config, items):
    if self._ranks is not None:
      items[:] = sorted(
          (i for i in items if i.nodeid in self._ranks),
          key=lambda i: self._ranks[i.nodeid],
      )

  def pytest_collection_finish(self, session):
    self.at_import = set(self.hits)

  def pytest_runtest_setup(self, item):
    if self._ranks is None:
      if "jax" in sys.modules:  # every test traces for itself
        sys.modules["jax"].clear_caches()
      self.hits.clear()

  def pytest_runtest_logreport(self, report):
    if report.failed:
      self._failed.append(report.nodeid)
    elif self._ranks is None and report.when == "call":
      hits = collections.defaultdict(list)
      for module, line in sorted(self.hits):
        hits[module].append(line)
      self.tests[report.nodeid] = {
          "seconds": report.duration,
          "hits": dict(hits),
      }

  def pytest_sessionfinish(self, session, exitstatus):
    out = {"failed": self._failed, "tests": self.tests}
    if self._ranks is None:
      out["imported"] = list(sys.modules)
      out["at_import"] = sorted(self.at_import)
    self._report.write_text(json.dumps(out))


def _digest(*parts: bytes) -> str:
  out = hashlib.sha256()
  for part in parts:
    out.update(hashlib.sha256(part).digest())
  return out.hexdigest()[:24]


def _print(text: str) -> None:
  print(text, flush=True)


class Checker:
  """Runs mutants of a package's modules against its tests."""

  def __init__(
      self,
      root: pathlib.Path,
      tests: dict[str, Sequence[str]],
      cache: pathlib.Path,
      timeout: float,
      probed: Iterable[str] = (),
  ):
    """Makes a checker.

    Args:
      root: folder that holds the package and its tests.
      tests: by module, its tests: its own file first, then files or test ids.
      cache: folder that is kept between runs.
      timeout: CPU seconds a mutant, beside thrice those of its tests.
      probed: further modules whose lines the probes name, so that the runs with
        probes serve them too.
    """
    self._root = root
    self._tests = {m: tuple(files) for m, files in tests.items()}
    self._cache = cache
    self._timeout = timeout
    self._sources = {
        m: self._path(m).read_bytes() for m in sorted({*tests, *probed})
    }
    self._coverage: dict[str, dict] = {}
    self._killers = collections.defaultdict(collections.Counter)
    self._reports = pathlib.Path(tempfile.mkdtemp(dir=cache))
    self._compiled: set[str] = set()

  def _path(self, module: str) -> pathlib.Path:
    return self._root / (module.replace(".", "/") + ".py")

  def faultless(self) -> list[Mutant]:
    """One a module that changes nothing: what a killed one means is known."""
    ends = {m: len(self._sources[m]) for m in self._tests}
    return [
        Mutant(m, "", 0, 0, end, end, "", "None") for m, end in ends.items()
    ]

  def mutants(self) -> list[Mutant]:
    """Those of all modules with tests."""
    return [x for m in self._tests for x in mutants_of(m, self._sources[m])]

  # -- children ------------------------------------------------------------
  def _child(self, sources, files, ranks, report, arguments, seconds):
    """In the fork: imports the changed modules and runs their tests."""
    # Of CPU: on a busy machine a slow test must not look like a hanging one.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    log = os.open(report.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
      plugin = _Plugin(ranks, report, _Injector(sources))
      builtins.__mutate_hit__ = lambda *place: plugin.hits.add(place)
      gone = set()
      for module in sources:
        gone |= _dependents(module, module.split(".")[0])
      for name in list(sys.modules):
        if name in gone or name.split(".")[0] == "tests":
          del sys.modules[name]
      os.chdir(self._root)
      import pytest  # pylint: disable=g-import-not-at-top

      quick = "addopts=-m 'not slow and not aot and not device'"  # no xdist
      options = ["-q", "-p", "no:cacheprovider", "--assert=plain", "-o", quick]
      code = pytest.main([*options, *arguments, *files], plugins=[plugin])
    except BaseException:  # an import that fails is a mutant that is noticed
      import traceback  # pylint: disable=g-import-not-at-top

      traceback.print_exc()
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(int(code))

  def _fork(self, *job) -> int:
    pid = os.fork()
    if pid == 0:
      os.setpgid(0, 0)
      self._child(*job)
    return pid

  # -- which tests reach what ----------------------------------------------
  def prepare(self, log=_print) -> None:
    """Runs the tests with probes, once for every state of the files."""
    files = list(dict.fromkeys(f for fs in self._tests.values() for f in fs))
    own = {m: _probe(m, source) for m, source in self._sources.items()}
    now = {m: _digest(source) for m, source in self._sources.items()}
    self._import()
    for file in files:
      users = [m for m, fs in self._tests.items() if file in fs]
      if all(m.startswith(_READERS) for m in users):  # it is its only test
        self._coverage[file] = {
            "tests": {file: {"seconds": 20.0, "hits": {}}}, "imported": [],
        }  # fmt: skip
        continue
      made_of = self._made_of(file)
      key = _digest(file.encode(), *(path.read_bytes() for path in made_of))
      saved = self._cache / f"coverage_{key}.json"
      entry = json.loads(saved.read_text()) if saved.exists() else {}
      if any(now.get(m, v) != v for m, v in entry.get("reached", {}).items()):
        entry = {}
      if not entry:
        start = time.monotonic()
        report = self._reports / "coverage.json"
        limit = resource.RLIM_INFINITY
        probes = {
            m: source
            for m, source in own.items()
            if not m.startswith(_READERS) or self._path(m) in made_of
        }
        pid = self._fork(probes, [file], None, report, [], limit)
        _, status, usage = os.wait4(pid, 0)
        entry = json.loads(report.read_text())
        broken = entry["failed"]
        if broken:
          text = report.with_suffix(".log").read_text()[-3000:]
          log(f"left out, fails without any fault: {broken}\n{text}")
        log(
            f"{file}: tests reached in {time.monotonic() - start:.0f} s"
            f" ({usage.ru_utime + usage.ru_stime:.0f} CPU s)"
        )
        reached = {m for t in entry["tests"].values() for m in t["hits"]}
        entry["reached"] = {m: now[m] for m in sorted(reached)}
        saved.write_text(json.dumps(entry))
      self._coverage[file] = entry
    self._import()

  def _made_of(self, file: str) -> list[pathlib.Path]:
    path, _, case = file.partition("::")
    paths = [self._root / path]
    if case:
      name = case[case.index("[") + 1 : -1]
      paths.append(self._root / f"tests/golden_readers/{name}.py")
      paths.append(self._root / f"tests/golden/{name}.npz")
    return paths

  def _import(self) -> None:
    """What the children need, without what is under test or starts devices."""
    names = {n for c in self._coverage.values() for n in c["imported"]}
    ours = {m.split(".")[0] for m in self._sources} | {"tests", "__main__"}
    names = {n for n in names if n.split(".")[0] != "tests"}
    for point in importlib.metadata.entry_points(group="pytest11"):
      names.add(point.module)
    files = {f.split("::")[0] for fs in self._tests.values() for f in fs}
    for path in [self._path(m) for m in self._sources] + [
        self._root / f for f in files
    ]:
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
          names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
          names.add(node.module)
    for name in sorted(names):
      top = name.split(".")[0]
      if top not in ours and top != "conftest" and "_test" not in name:
        try:
          importlib.import_module(name)
        except BaseException:  # pylint: disable=broad-except
          continue  # made by hand, or not importable alone
    if (self._root / "tests/conftest.py").exists():
      importlib.import_module("tests.conftest")
    for name in sorted(names | set(self._sources)):
      if name.split(".")[0] in ours - {"tests", "__main__"}:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    self._compiled = self._programs()

  def _programs(self) -> set[str]:
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()

  def _reaching(self, mutant: Mutant) -> dict[str, tuple]:
    """{test: sort key} of the tests that reach a mutant."""
    if not mutant.function:
      return {}
    lines = {mutant.statement}
    tree = ast.parse(self._sources[mutant.module])
    own = _statements(tree, mutant.function)
    if mutant.function == "<module>":
      own = _users(tree, mutant.statement)
    if mutant.statement not in own or mutant.function == "<module>":
      lines = own  # a default or a constant: wherever the function runs
    if mutant.module.startswith(_READERS):
      lines = set()
    if isinstance(_scope(tree, mutant.function), ast.ClassDef):
      lines = own  # a field
    name = mutant.function.split(".")[-1]
    hint = _hint(mutant, mutant.statement not in own)
    found = {}
    for file in self._tests[mutant.module]:
      text = "".join(
          p.read_text() for p in self._made_of(file) if p.suffix == ".py"
      )
      early = {
          line
          for module, line in self._coverage[file].get("at_import", ())
          if module == mutant.module
      }
      for test, entry in self._coverage[file]["tests"].items():
        hits = set(entry["hits"].get(mutant.module, ())) | early
        if not lines or hits & lines:
          spread = sum(len(h) for h in entry["hits"].values())
          found[test] = (
              not any(part in test for part in hint),
              -self._killers[mutant.module, mutant.function][test],
              "golden" in file,
              name not in text,
              entry["seconds"] * (1 + spread / 50),
              test,
              entry["seconds"],
          )
    return found

  # -- verdicts that are kept ------------------------------------------------
  def _verdict_key(self, mutant: Mutant) -> str:
    """Changes with the definition that holds the fault."""
    source = self._sources[mutant.module]
    lines = source.splitlines(keepends=True)
    part = source
    if mutant.function not in ("", "<module>"):
      for node in ast.parse(source).body:
        if node.lineno <= mutant.line <= node.end_lineno:
          part = b"".join(lines[node.lineno - 1 : node.end_lineno])
    return _digest(mutant.name.encode(), part)

  def _witness(self, mutant: Mutant, killer: str) -> str:
    """Changes with what the verdict came from: a test, or the lack of one."""
    file, _, test = killer.partition("::")
    if killer and not test:
      return ""  # a signal, or the import: no test
    if not killer:
      files = self._tests[mutant.module]
      paths = dict.fromkeys(p for f in files for p in self._made_of(f))
      return _digest(*(path.read_bytes() for path in paths))
    if "[" in test and "golden" in file:
      return _digest(*(path.read_bytes() for path in self._made_of(killer)))
    if not (self._root / file).exists():
      return "gone"
    text = (self._root / file).read_text()
    name = test.split("[")[0].split("::")[-1]
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef) and node.name == name:
        return _digest(ast.unparse(node).encode())
    return "gone"

  def known(self, mutants: Iterable[Mutant]) -> dict[Mutant, str]:
    """{mutant: its killer or ""} for the verdicts that still hold."""
    saved, out = {}, {}
    path = self._cache / "verdicts.jsonl"
    if path.exists():
      for line in path.read_text().splitlines():
        key, killer, witness = json.loads(line)
        saved[key] = killer, witness
    witnesses = {}
    for mutant in mutants:
      killer, witness = saved.get(self._verdict_key(mutant), (None, None))
      if killer is None:
        continue
      place = killer or mutant.module
      if place not in witnesses:
        witnesses[place] = self._witness(mutant, killer)
      if witnesses[place] == witness:
        out[mutant] = killer
        if killer:
          self._killers[mutant.module, mutant.function][killer] += 1
    return out

  def remember(self, mutant: Mutant, killer: str) -> None:
    """Keeps a verdict for the next run."""
    entry = [self._verdict_key(mutant), killer, self._witness(mutant, killer)]
    with (self._cache / "verdicts.jsonl").open("a") as file:
      file.write(json.dumps(entry) + "\n")

  # -- one mutant ------------------------------------------------------------
  def _start(self, mutant: Mutant, whole: bool) -> tuple:
    found = self._reaching(mutant)
    if whole:  # the other tests of its own file, whatever the probes said
      own = self._coverage[self._tests[mutant.module][0]]["tests"]
      found = {
          test: (1, 0, 0, 0, entry["seconds"], test, entry["seconds"])
          for test, entry in own.items()
          if test not in found
      }
    if not mutant.function:  # all passed with the probes: a few tell enough
      found = dict(sorted(found.items(), key=lambda item: item[1])[:5])
    if not found:
      return None, None
    order = sorted(found, key=found.get)
    ranks = {test: i for i, test in enumerate(order)}
    files = sorted({test.split("::")[0] for test in order})
    text = mutant.apply(self._sources[mutant.module])
    report = self._reports / f"{mutant.start}_{abs(hash(mutant))}.json"
    sources = {mutant.module: text}
    seconds = sum(found[test][-1] for test in found)
    limit = int(self._timeout + 3 * seconds)
    pid = self._fork(sources, files, ranks, report, ["-x"], limit)
    return pid, report

  def run(
      self, mutants: Iterable[Mutant], jobs: int, whole: bool = False
  ) -> Iterator[tuple[Mutant, str, float]]:
    """Yields (mutant, what killed it or "", CPU seconds) as they end."""
    waiting, running = collections.deque(mutants), {}
    while waiting or running:
      while waiting and len(running) < jobs:
        mutant = waiting.popleft()
        pid, report = self._start(mutant, whole)
        if pid is None:
          yield mutant, "", 0.0
        else:
          running[pid] = (mutant, report, time.monotonic())
      if not running:
        continue
      # Asks instead of waiting for any child: others in this process may wait.
      time.sleep(0.02)
      for pid, (mutant, report, since) in list(running.items()):
        done, status, usage = os.wait4(pid, os.WNOHANG)
        killer = None
        if not done:
          if time.monotonic() - since < _LONGEST:
            continue
          os.killpg(pid, signal.SIGKILL)
          _, status, usage = os.wait4(pid, 0)
        del running[pid]
        if os.WIFSIGNALED(status):
          killer = f"signal {os.WTERMSIG(status)}"  # hangs, or crashes
        elif status:
          try:
            killer = json.loads(report.read_text())["failed"][0]
          except (OSError, ValueError, LookupError):
            killer = None
          killer = killer or "import"
          self._killers[mutant.module, mutant.function][killer] += 1
        for file in (report, report.with_suffix(".log")):
          file.unlink(missing_ok=True)
        self._sweep()
        yield mutant, killer or "", usage.ru_utime + usage.ru_stime

  def close(self) -> None:
    """Removes what only this run needed."""
    shutil.rmtree(self._reports, ignore_errors=True)

  def _sweep(self) -> None:
    """Forgets the programs of mutants."""
    for name in self._programs() - self._compiled:
      path = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"], name)
      if time.time() - path.stat().st_mtime > 120:
        path.unlink(missing_ok=True)


def _hint(mutant: Mutant, default: bool) -> tuple[str, ...]:
  """Parts of the names of tests that are likely to see a fault."""
  if "_checks." in mutant.original and mutant.replacement == "None":
    return ("bad_",)
  if mutant.original.startswith("_checks.at_least_float32"):
    return ("half", "precision", "dtype", "float32", "widen")
  if "stop_gradient" in mutant.original and "stop_" not in mutant.replacement:
    return ("frozen", "stop", "grad")
  return ("default",) if default else ("",)


def _scope(tree: ast.AST, function: str) -> ast.AST:
  """The function or class of a dotted name; the module for "<module>"."""
  scope = tree
  for part in function.split("."):
    for node in ast.walk(scope):
      if getattr(node, "name", None) == part and node is not scope:
        scope = node
        break
  return scope


def _statements(tree: ast.AST, function: str) -> set[int]:
  """Lines of the statements inside a function or class, by dotted name."""
  scope = _scope(tree, function)
  if scope is tree:
    return set()
  return {
      node.lineno
      for node in ast.walk(scope)
      if isinstance(node, ast.stmt) and node is not scope
  }


def _users(tree: ast.Module, line: int) -> set[int]:
  """Lines of the top-level definitions that read what `line` assigns."""
  (statement,) = [s for s in tree.body if s.lineno == line]
  names = {
      n.id
      for n in ast.walk(statement)
      if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
  }
  return {
      node.lineno
      for top in tree.body
      if any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(top))
      for node in ast.walk(top)
      if isinstance(node, ast.stmt) and node is not top
  }


def read_equivalent(path: pathlib.Path) -> dict[str, str]:
  """{name of a mutant: why it is no fault} from the committed list."""
  out = {}
  if path.exists():
    for line in path.read_text().splitlines():
      if line.strip() and not line.startswith("#"):
        name, reason = line.rsplit(" | ", 1)
        out[name.strip()] = reason.strip()
  return out


def _tests_of(root: pathlib.Path, module: str) -> tuple[str, ...]:
  if module.startswith(_READERS):
    return (GOLDEN.format(module.removeprefix(_READERS)),)
  folder, name = module.split(".")[1:]
  own = f"tests/{folder}/{name}_test.py"
  beside = (
      str(p.relative_to(root)) for p in root.glob("tests/processes/*_test.py")
  )
  files = [own, *(sorted(beside) if folder == "processes" else ())]
  files = [*dict.fromkeys(files), *SHARED_TESTS]
  tree = ast.parse((root / (module.replace(".", "/") + ".py")).read_text())
  names = {getattr(node, "name", None) for node in tree.body}
  for path in sorted((root / "tests/golden_readers").glob("*.py")):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    packages = {n.id for n in nodes if isinstance(n, ast.Name)}
    recorded = root / f"tests/golden/{path.stem}.npz"
    indirect = folder == "processes" and folder in packages
    if recorded.exists() and (used & names or indirect):
      files.append(GOLDEN.format(path.stem))
  return tuple(f for f in files if (root / f.split("::")[0]).exists())


@dataclasses.dataclass
class Result:
  """What became of the mutants of a module."""

  killed: int = 0
  equivalent: int = 0
  survivors: list[Mutant] = dataclasses.field(default_factory=list)
  not_run: int = 0

  @property
  def share(self) -> str:
    """Killed of those that are faults."""
    total = self.killed + len(self.survivors)
    return f"{100 * self.killed / total:.1f} %" if total else "-"

  def __add__(self, other: "Result") -> "Result":
    return Result(
        self.killed + other.killed,
        self.equivalent + other.equivalent,
        self.survivors + other.survivors,
        self.not_run + other.not_run,
    )


def check(
    checker: Checker,
    mutants: Sequence[Mutant],
    equivalent: dict[str, str],
    jobs: int,
    whole: bool = False,
    fresh: bool = True,
    chosen: Sequence[Mutant] | None = None,
    log=_print,
) -> dict[str, Result]:
  """Runs mutants; gives {module: result}.

  `whole` tries a survivor on the other tests of its module's file too, in case
  a cache between tests kept the probes from seeing that one reaches it. Without
  `fresh`, verdicts of earlier runs count. Only those of `chosen` are run, if
  given. Stopped by the keyboard, it gives what is known so far.
  """
  faults = [m for m in mutants if m.name not in equivalent]
  verdicts = {} if fresh else checker.known(faults)
  if verdicts:
    log(f"{len(verdicts)} of {len(faults)} verdicts are known")
  wanted = set(faults if chosen is None else chosen)
  todo = [m for m in faults if m in wanted and m not in verdicts]
  cpu, start = [], time.monotonic()

  def note(mutant, killer, seconds):
    cpu.append(seconds)
    place = f"{mutant.name} (line {mutant.line})"
    log(
        f"{len(cpu)}/{len(todo)} +{time.monotonic() - start:.0f} s,"
        f" {seconds:.1f} CPU s, {killer or 'ALIVE'}: {place}"
    )
    verdicts[mutant] = killer
    if not whole or killer:
      checker.remember(mutant, killer)

  if todo:
    changed = {m.module for m in todo}
    sane = [m for m in checker.faultless() if m.module in changed]
    sane = [m for m in sane if m not in checker.known(sane)]
    for mutant, killer, _ in checker.run(sane, jobs, whole=True):
      if killer:
        raise SystemExit(f"{mutant.module}: {killer} fails without a fault")
      checker.remember(mutant, killer)
      log(f"{mutant.module}: tests pass without a fault")
  try:
    for verdict in checker.run(todo, jobs):
      note(*verdict)
    again = [m for m in todo if whole and not verdicts[m]]
    whole = False  # this time the verdict stands
    for verdict in checker.run(again, jobs, whole=True):
      note(*verdict)
  except KeyboardInterrupt:
    log("stopped")
  if cpu:
    log(
        f"{len(cpu)} mutants in {time.monotonic() - start:.0f} s,"
        f" {sum(cpu) / len(cpu):.2f} CPU s each"
    )
  out = {m.module: Result() for m in mutants}
  for mutant in sorted(mutants, key=lambda m: (m.module, m.start)):
    result = out[mutant.module]
    if mutant.name in equivalent:
      result.equivalent += 1
    elif verdicts.get(mutant):
      result.killed += 1
    elif mutant in verdicts:
      result.survivors.append(mutant)
    else:
      result.not_run += 1
  return out


def summary(results: dict[str, Result], reasons: dict[str, str]) -> str:
  """The report's table and list, in Markdown."""
  lines = [
      "| module | mutants | killed | equivalent | survive | not run | share |",
      "|---|---|---|---|---|---|---|",
  ]

  def row(name, result):
    counts = (
        result.killed, result.equivalent, len(result.survivors), result.not_run
    )  # fmt: skip
    cells = (name, sum(counts), *counts, result.share)
    lines.append("| " + " | ".join(str(c) for c in cells) + " |")

  parts = collections.defaultdict(Result)
  for name, result in results.items():
    row(name.removeprefix("distilljax.").removeprefix("tests."), result)
    reader = name.startswith(_READERS)
    parts["all readers" if reader else "all of the library"] += result
  for name, result in parts.items():
    row(f"**{name}**", result)
  survivors = [m for r in results.values() for m in r.survivors]
  lines += ["", "Survivors:" if survivors else "No survivors.", ""]
  for mutant in survivors:
    why = reasons.get(mutant.name, "no test tells it from the program")
    lines.append(f"- `{mutant.name}`: {why}")
  return "\n".join(lines).strip()


REPORT = """# Mutation check

Written by `{command}`.

A mutant is one module with one small fault: an operator, a sign, a comparison
or a constant changed, a stop_gradient, mask, weight or check dropped. It is
killed when a quick test fails. Equivalent mutants are the same program in other
words; `tests/tools/equivalent_mutants.txt` gives the reason for each, and they
do not count in the share. A fault in a golden reader must make its own golden
test red.

Where some were not run, those that were are nearly all drawn at random
(`--sample`). A survivor of a draw gets a test, so that of the mutants never run
more will survive than the share says. Runs add up: the next one with a larger
`--sample`, or none, runs what is left.

{summary}
"""


def main(arguments: Sequence[str] | None = None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("module", nargs="*", help="e.g. losses.feature")
  parser.add_argument("--sample", type=int, help="mutants a module, at random")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--jobs", type=int, default=2)
  parser.add_argument("--timeout", type=float, default=60, help="CPU seconds")
  parser.add_argument("--cache", help="folder that is kept between runs")
  parser.add_argument("--only", help="part of the name of the mutants to run")
  parser.add_argument("--whole", action="store_true", help="see `check`")
  parser.add_argument("--own", action="store_true", help="skip golden tests")
  parser.add_argument("--fresh", action="store_true", help="no kept verdicts")
  parser.add_argument("--known", action="store_true", help="kept verdicts only")
  parser.add_argument("--readers", action="store_true", help="golden ones too")
  parser.add_argument("--list", action="store_true", help="names only")
  parser.add_argument("--report", help="Markdown file to write")
  args = parser.parse_args(arguments)
  root = HERE.parents[1]
  modules = [_full_name(m) for m in args.module] or list(MODULES)
  if args.readers:
    modules += [_READERS + name for name in READERS]
  default = pathlib.Path(tempfile.gettempdir(), f"mutate_{os.getuid()}")
  cache = pathlib.Path(args.cache or default)
  cache.mkdir(parents=True, exist_ok=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache / "programs")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
  os.environ.setdefault("XLA_FLAGS", FLAGS)
  sys.path.insert(0, str(root))

  tests = {m: _tests_of(root, m) for m in modules}
  if args.own:
    tests = {
        m: tuple(t for t in files if t.endswith("_test.py") or len(files) == 1)
        for m, files in tests.items()
    }
  checker = Checker(
      root,
      tests,
      cache,
      args.timeout,
      MODULES,
  )
  mutants = checker.mutants()
  if args.only:
    mutants = [m for m in mutants if args.only in m.name]
  if args.list:
    print(*(f"{m.name} (line {m.line})" for m in mutants), sep="\n")
    return 0
  equivalent = read_equivalent(EQUIVALENT)
  chosen = mutants
  if args.sample is not None:
    chosen = [
        mutant
        for module in modules
        for mutant in _sample(
            [m for m in mutants if m.module == module], args.sample, args.seed
        )
    ]
  _print(f"{len(chosen)} of {len(mutants)} mutants, seed {args.seed}")
  if args.known:
    chosen = []
  else:
    checker.prepare()
  results = check(
      checker, mutants, equivalent, args.jobs, args.whole, args.fresh, chosen
  )
  checker.close()
  text = summary(results, read_equivalent(SURVIVORS))
  print(text)
  if args.report:
    command = ["python -m tests.tools.mutate", *args.module]
    command += ["--whole"] if args.whole else []
    command += ["--readers"] if args.readers else []
    if args.sample is not None:
      command += [f"--sample {args.sample} --seed {args.seed}"]
    command += [f"--report {args.report}"]
    pathlib.Path(args.report).write_text(
        REPORT.format(command=" ".join(command), summary=text)
    )
  return int(any(r.survivors for r in results.values()))


def _full_name(module: str) -> str:
  if module.startswith("golden_readers."):
    return f"tests.{module}"
  known = module.startswith(("distilljax.", "tests."))
  return module if known else f"distilljax.{module}"


def _sample(mutants: list[Mutant], n: int, seed: int) -> list[Mutant]:
  # A larger sample holds the smaller one, so that its verdicts serve again.
  order = random.Random(seed).sample(mutants, len(mutants))
  return sorted(order[:n], key=mutants.index)


FLAGS = (
    "--xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"
)

if __name__ == "__main__":
  sys.exit(main())
