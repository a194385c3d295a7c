"""Plans a config's train step for hardware that is not there.

python -m experiments.plan
    --config=configs/plans/dmd2_dit.py --topology=v5p:4x4x4 [--stage=NAME]
    [--updates=student,critic] [--scaling=2x2x4,8x8x8] [--search]
    [--json=FILE] [--markdown=FILE] [--hlo=FILE] [--nocompile]

Compiles the step that `experiments.train` would run, ahead of time, and prints
whether it fits, what lies where on a chip, FLOPs, bytes, collectives, time
bounds and which of them binds. No array is made, no chip is needed: TPUs want
the extra `plan`, an H100 the CUDA plugin (docs/planning.md). `--search` tries
rules, accumulation and rematerialisation, each in a process of its own, and
ranks what fits. `--nocompile` stops before the compiler: seconds, with bytes of
the state and FLOPs only. `--config.key=value` replaces values, as everywhere.
"""

import importlib
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags, logging

from distilljax import plan, train
from distilljax.plan import chips as chips_lib
from distilljax.plan import hlo
from distilljax.train import config as config_lib
from distilljax.train import sharding
from experiments import entry, shapes
from experiments import job as job_lib

_TOPOLOGY = flags.DEFINE_string("topology", None, "such as v5p:8x8x8, h100:8")
_STAGE = flags.DEFINE_string("stage", None, "stage; default: the last one")
_UPDATES = flags.DEFINE_list(
  "updates", None, "networks of the step; default: the step with most updates"
)
_SCALING = flags.DEFINE_list(
  "scaling", [], "shapes to scale the plan to on paper: 2x2x4,4x4x4"
)
_SEARCH = flags.DEFINE_bool("search", False, "try rules, accumulation, remat")
_COMPILE = flags.DEFINE_bool("compile", True, "compile, not only trace")
_JSON = flags.DEFINE_string("json", None, "file for the same content")
_HLO = flags.DEFINE_string("hlo", None, "file for the compiled text")
_MARKDOWN = flags.DEFINE_string("markdown", None, "file for the table")

SECONDS = 1800  # that one candidate of a search may take
GIB = 2**30


class Program(NamedTuple):
  """A step and the shapes that it is called with.

  Attributes:
    stage: of the config.
    step: the train step.
    updates: networks that it updates.
    state: shapes in their shardings, as are frozen and batch.
    frozen: frozen networks.
    batch: rows.
  """

  stage: train.Stage
  step: train.Step
  updates: tuple[str, ...]
  state: train.State
  frozen: dict[str, Any]
  batch: dict[str, Any]

  def trace(self) -> Any:
    """The step as `jax.stages.Traced`."""
    return self.step.trace(self.updates, self.state, self.frozen, self.batch)

  def networks(self) -> dict[str, dict[str, Any]]:
    """Shapes by network and kind: what `plan.by_network` takes."""
    out = {}
    for name, role in self.stage.method.networks.items():
      if isinstance(role, train.Trained):
        optimizer = self.state.opt_state[name]
        kinds = {"parameters": self.state.params[name], "optimizer": optimizer}
      elif isinstance(role, train.Ema):
        kinds = {"average": self.state.params[name]}
      else:
        kinds = {"frozen": self.frozen[name]}
      out[name] = kinds
    return out


def build(config: Any, mesh: jax.sharding.Mesh) -> Any:
  """The job of a config, whatever launcher it is for.

  Args:
    config: a config of `configs/`.
    mesh: that its batches must divide over.
  """
  language = "task" in config
  module = importlib.import_module(
    "experiments.language_job" if language else "experiments.job"
  )
  problem = None
  if config.data.name == "shapes":
    known = ("name", "batch_size", "rows")
    known += (
      ("vocab_size", "prompt_length", "completion_length")
      if language
      else ("augment", "folder", "shape", "num_classes")
    )
    config_lib.known("data", config.data, known)
    problem = (shapes.TextShapes if language else shapes.ImageShapes)(
      config.data
    )
  return module.build(config, job_lib.silent, mesh, problem)


def _key():
  return jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))


def _parameters(stages: Sequence[train.Stage]) -> dict[str, Any]:
  """Shapes of the parameters of the last of these stages by network."""
  results: dict[str, Any] = {}
  for stage in stages:
    params = jax.eval_shape(stage.init, _key(), results)
    roles = stage.method.networks
    for name in stage.method.named(train.Ema):
      params.setdefault(name, params[roles[name].of])
    results[stage.name] = params
  return results[stages[-1].name]


def _batch(stage: train.Stage, params, updates) -> dict[str, Any]:
  """Shapes of the rows that a step gets."""
  rows = {
    k: jax.ShapeDtypeStruct(v.shape, v.dtype)
    for k, v in next(stage.data()).items()
  }
  if stage.method.collect is None:
    return rows

  def collect(params, rows, key):
    carry = None if stage.method.carry is None else stage.method.carry()
    context = train.Context(jax.numpy.int32(0), key, updates, carry)
    return stage.method.collect(params, rows, context)

  try:
    return jax.eval_shape(collect, params, rows, _key())
  except jax.errors.TracerArrayConversionError:
    raise ValueError(
      f"plan: {stage.method.name} scores rollouts on the host, so the shapes"
      " of its batches are not known before they are made; plan another stage"
    ) from None


def program(
  config: Any,
  mesh: jax.sharding.Mesh,
  *,
  stage: str | None = None,
  updates: Sequence[str] | None = None,
) -> Program:
  """The step of a config's stage, as shapes: nothing is computed.

  Args:
    config: a config of `configs/`.
    mesh: of devices that need not be there.
    stage: its name, None for the last one.
    updates: networks that the step updates, an entry of the method's schedule;
      None takes the entry with most networks.

  Raises:
    ValueError: one line for what cannot be.
  """
  stages = build(config, mesh).stages
  names = [s.name for s in stages]
  chosen = names[-1] if stage is None else stage
  if chosen not in names:
    raise ValueError(
      f"plan: stage must be one of {names}, got {chosen!r}"
    )
  stages = stages[: names.index(chosen) + 1]
  stage = stages[-1]
  entries = stage.method.schedule.entries()
  if updates is None:
    updates = max(entries, key=len)
  if tuple(updates) not in entries:
    raise ValueError(
      f"plan: updates must be one of {[','.join(e) for e in entries]}, got"
      f" {','.join(updates)!r}"
    )
  step = train.make_step(
    stage.method, stage.optimizers, mesh, **stage.options
  )
  params = _parameters(stages)
  rows = _batch(stage, params, tuple(updates))
  state = step.abstract(params, _key())
  frozen = {n: params[n] for n in stage.method.named(train.Frozen)}
  placed = sharding.rows(mesh)
  return Program(
    stage,
    step,
    tuple(updates),
    state,
    step.abstract_place(frozen),
    {
      k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=placed)
      for k, v in rows.items()
    },
  )


def _refusal(error: Exception) -> dict[str, Any] | None:
  """What the compiler said it needs and may use, if memory is its reason."""
  size = r"([\d.]+[KMGT])"
  # The second form is that of a program far too large to be placed.
  for form in (
    rf"[Uu]sed {size} of {size} hbm",
    rf"\({size}\) exceeds available HBM \({size}\)",
  ):
    if found := re.search(form, str(error)):
      used, room = (
        int(float(text[:-1]) * 2 ** (10 * ("KMGT".index(text[-1]) + 1)))
        for text in found.groups()
      )
      return {"needed": used, "usable": room}
  return None


def report(
  config: Any,
  topology: chips_lib.Topology,
  mesh: jax.sharding.Mesh,
  *,
  stage: str | None = None,
  updates: Sequence[str] | None = None,
  compile_step: bool = True,
  hlo_file: str | None = None,
) -> dict[str, Any]:
  """Everything that the table says, as plain values.

  Args:
    config: a config of `configs/`.
    topology: what is planned for.
    mesh: of its devices.
    stage: see `program`.
    updates: see `program`.
    compile_step: False stops before the compiler.
    hlo_file: for the compiled text.
  """
  began = time.monotonic()
  made = program(config, mesh, stage=stage, updates=updates)
  traced = made.trace()
  flops = plan.count_flops(traced.jaxpr)
  chip = topology.chip
  rows = plan.by_network(made.networks())
  batch = plan.bytes_per_chip(made.batch)
  state = sum(r["bytes"] for r in rows)
  run = config.run
  out = {
    "title": config.title,
    "stage": made.stage.name,
    "method": made.stage.method.name,
    "updates": list(made.updates),
    "topology": topology.name,
    "chips": topology.size,
    "mesh": dict(mesh.shape),
    "rules": made.step.rules,
    "accumulation": made.step.accumulation,
    "unroll": bool(run.get("unroll", True)),
    "compute_dtype": run.compute_dtype,
    "frozen_dtype": run.frozen_dtype,
    "model": config.model.to_dict(),
    "batch": {
      k: [*v.shape, str(v.dtype)] for k, v in sorted(made.batch.items())
    },
    "flops": {
      "total": flops.total,
      "chip": flops.total / topology.size,
      **flops._asdict(),
      "unknown_loops": list(flops.unknown_loops),
    },
    "memory": {
      "rows": rows,
      "state": state,
      "batch": batch,
      "needed": state + batch,
      "usable": chip.usable,
      "hbm": chip.hbm,
    },
    "seconds": {"trace": time.monotonic() - began},
    "compiled": compile_step,
  }
  memory = out["memory"]
  if compile_step:
    _compile(traced, topology, mesh, out, hlo_file)
  memory["fits"] = memory["needed"] <= memory["usable"]
  memory["spare"] = memory["usable"] - memory["needed"]
  return out


def _compile(traced, topology, mesh, out, hlo_file) -> None:
  """Adds what only the compiler knows."""
  began = time.monotonic()
  memory = out["memory"]
  try:
    done = traced.lower().compile()
  except jax.errors.JaxRuntimeError as e:
    refused = _refusal(e)
    if refused is None:
      line = str(e).strip().splitlines()[0][:300]
      raise ValueError(f"plan: the compiler refused the step: {line}") from None
    memory.update(refused)
    out["refused"] = True
    out["seconds"]["compile"] = time.monotonic() - began
    return
  out["seconds"]["compile"] = time.monotonic() - began
  found = done.memory_analysis()
  memory.update(
    arguments=found.argument_size_in_bytes,
    outputs=found.output_size_in_bytes,
    aliased=found.alias_size_in_bytes,
    temporaries=found.temp_size_in_bytes,
    program=found.generated_code_size_in_bytes,
  )
  memory["needed"] = (
    memory["arguments"]
    + memory["outputs"]
    - memory["aliased"]
    + memory["temporaries"]
    + memory["program"]
  )
  out["flops"]["compiler"] = (done.cost_analysis() or {}).get("flops", 0.0)
  text = done.as_text()
  _write(hlo_file, text)
  moved = plan.read_moved(text, mesh.shape)
  coordinates = [
    getattr(d, "coords", (i,)) for i, d in enumerate(mesh.devices.flat)
  ]
  bounds = plan.bounds(
    flops=out["flops"]["total"],
    moved=moved,
    topology=topology,
    coordinates=coordinates,
  )
  out["moved"] = {
    "memory": moved.memory,
    "network": hlo.total(moved.collectives),
    "collectives": [
      {k: v for k, v in c._asdict().items() if k != "members"}
      for c in moved.collectives
    ],
    "unknown_loops": list(moved.unknown_loops),
  }
  out["bounds"] = {
    **bounds._asdict(),
    "step": bounds.step,
    "binding": bounds.binding,
  }


# --- the table ----------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
  line = lambda cells: f"| {' | '.join(str(c) for c in cells)} |"
  right = ["---", *["---:"] * (len(head) - 1)]
  return [line(head), line(right), *map(line, rows)]


def _size(number: float) -> str:
  """Bytes of a chip."""
  for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
    if abs(number) >= unit:
      return f"{number / unit:.2f} {name}"
  return f"{number / 2**10:.1f} KiB"


def _count(number: float) -> str:
  for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
    if number >= unit:
      return f"{number / unit:.2f} {name}"
  return f"{number:.0f}"


def _time(seconds: float) -> str:
  if seconds >= 1:
    return f"{seconds:.2f} s"
  return f"{seconds * 1e3:.3g} ms"


def verdict(out: Mapping[str, Any]) -> str:
  """Fits or not, and by how much: one line."""
  memory = out["memory"]
  needs = f"{_size(memory['needed'])} of {_size(memory['usable'])} a chip"
  where = out["topology"]
  if memory["spare"] < 0:
    more = "" if out["compiled"] else " for its state alone"
    return (
      f"does not fit {where}: it needs {needs}{more},"
      f" {_size(-memory['spare'])} too much"
    )
  if not out["compiled"]:
    return (
      f"state and batch fit {where}: {needs}; what activations add is known"
      " after the compile"
    )
  return f"fits {where}: it needs {needs}, {_size(memory['spare'])} to spare"


def _rules(out) -> str:
  rules = out["rules"]
  if len(set(rules.values())) == 1:
    return next(iter(rules.values()))
  return ", ".join(f"{k} {v}" for k, v in rules.items())


def _mesh(out) -> str:
  return " x ".join(f"{k} {v}" for k, v in out["mesh"].items())


def _memory_lines(out) -> list[str]:
  memory = out["memory"]
  rows = [
    (r["network"], r["kind"], _count(r["numbers"]), _size(r["bytes"]))
    for r in memory["rows"]
  ]
  rows.append(("", "batch", "", _size(memory["batch"])))
  if "temporaries" in memory:
    # What jit leaves out of the arguments makes it negative.
    rest = memory["arguments"] - memory["state"] - memory["batch"]
    rest += memory["outputs"] - memory["aliased"]
    rows += [
      ("", "activations and temporaries", "", _size(memory["temporaries"])),
      ("", "program", "", _size(memory["program"])),
      ("", "layout, what is unused", "", _size(rest)),
    ]
  rows.append(("**all**", "", "", f"**{_size(memory['needed'])}**"))
  return _table(("network", "kind", "numbers", "a chip"), rows)


def _work_lines(out) -> list[str]:
  flops = out["flops"]
  lines = [
    f"FLOPs: {flops['total']:.4g} in all, {flops['chip']:.4g} a chip;"
    f" {flops['kernels'] / max(flops['total'], 1):.0%} of them in attention and"
    " output heads."
  ]
  if flops.get("compiler"):
    share = flops["compiler"] / max(flops["chip"], 1)
    lines.append(
      f"(The compiler's own figure, {flops['compiler']:.4g} a chip, is"
      f" {share:.1%} of that: it counts a loop's body once and kernels not at"
      " all.)"
    )
  for name in flops["unknown_loops"]:
    lines.append(f"A loop of unknown length was counted once: {name}.")
  if "moved" not in out:
    return lines
  moved = out["moved"]
  lines.append(f"Memory: {moved['memory'] / 1e9:.4g} GB a chip.")
  for name in moved["unknown_loops"]:
    lines.append(f"A compiled loop of unknown length was counted once: {name}.")
  if moved["collectives"]:
    rows = [
      (c["kind"], c["axes"], c["group"], f"{c['count']:.0f}",
       f"{c['bytes'] / 1e9:.4g} GB")
      for c in moved["collectives"]
    ]  # fmt: skip
    lines += ["", *_table(
      ("collective", "mesh axes", "chips", "runs", "to a chip"), rows
    )]  # fmt: skip
  return lines


def _bound_lines(out) -> list[str]:
  bounds = out["bounds"]
  share = bounds["compute"] / bounds["step"]
  network = f"{_time(bounds['network'])} + {_time(bounds['hops'])} of hops"
  return [
    *_table(
      ("at least", "a step"),
      (
        ("compute", _time(bounds["compute"])),
        ("memory", _time(bounds["memory"])),
        ("network", network),
      ),
    ),
    "",
    f"Binding: {bounds['binding']}; at most {share:.0%} of the chips' peak if"
    f" all overlaps. As scheduled, {_time(bounds['blocking'])} of the network"
    " are in collectives that a chip waits for.",
  ]


def _scaling_lines(out) -> list[str]:
  rows = [
    (
      r["chips"],
      r["topology"].partition(":")[2],
      _time(r["compute"]),
      f"{_time(r['network'])} + {_time(r['hops'])}",
      "yes" if r["hidden"] else "no",
      f"{r['overlapped']:.0%}",
      f"{r['serial']:.0%}",
      _size(r["bytes"]) + ("" if r["fits"] else " (too much)"),
    )
    for r in out["scaling"]
  ]
  head = (
    "chips", "shape", "compute", "network + hops", "can hide",
    "of peak, hidden", "not hidden", "a chip",
  )  # fmt: skip
  words = (
    "On paper, from the numbers above: a chip keeps its rows, and the axis that"
    " networks are cut over grows with the slice. docs/planning.md says what"
    " that leaves out."
  )
  return [*_table(head, rows), "", words]


def markdown(out: Mapping[str, Any]) -> str:
  """The report as a page."""
  updates = " and ".join(out["updates"])
  rows = "; ".join(f"{k} {v}" for k, v in out["batch"].items())
  seconds = ", ".join(f"{k} {v:.0f} s" for k, v in out["seconds"].items())
  lines = [
    f"# {out['title']}",
    "",
    f"`{out['command']}`" if "command" in out else "",
    "",
    f"**{verdict(out)[0].upper()}{verdict(out)[1:]}.**",
    "",
    f"A step of `{out['method']}` that updates {updates} (stage"
    f" {out['stage']}), {out['chips']} chips, mesh {_mesh(out)}, rules"
    f" {_rules(out)}, accumulation {out['accumulation']}, compute in"
    f" {out['compute_dtype']}, frozen networks in {out['frozen_dtype']}. Batch:"
    f" {rows}. Model: {json.dumps(out['model'])}. Took: {seconds}.",
    "",
    "## Bytes",
    "",
    *_memory_lines(out),
    "",
    "## Work",
    "",
    *_work_lines(out),
  ]
  if "bounds" in out:
    lines += ["", "## Time", "", *_bound_lines(out)]
  if "scaling" in out:
    lines += ["", "## Weak scaling", "", *_scaling_lines(out)]
  return "\n".join(lines) + "\n"


# --- the search ---------------------------------------------------------------


def candidates(
  config: Any, stage: str, topology: chips_lib.Topology
) -> Iterator[dict[str, Any]]:
  """Overrides to try: rules x accumulation x remat.

  Args:
    config: a config of `configs/`.
    stage: its block.
    topology: the slice.
  """
  chips = topology.size
  few = max(1, chips // 8)
  part = next((n for n in (8, 4, 2) if chips % n == 0 and n < chips), 1)
  # (rule, parts of a cut network (0: all), axis that takes chips, its size)
  rules = [("dp", 0, None, 1), ("fsdp", 0, None, 1)]
  if few > 1:
    rules.append(("fsdp", few, None, 1))
  for axis in ("tensor", "context"):
    if part > 1 and axis in config.run:
      rules.append((f"fsdp+{axis}", 0, axis, part))
  remats = ("none", "dots", "block") if "remat" in config.model else (None,)
  rows = config[stage].get("batch_size") or config.data.batch_size
  for (rule, fsdp, axis, parts), accumulation, remat in itertools.product(
    rules, (1, 2, 4), remats
  ):
    if rows % (chips // parts * accumulation):
      continue
    out = {
      "run.rules": rule,
      "run.fsdp": fsdp,
      f"{stage}.accumulation": accumulation,
      "run.unroll": False,
    }
    if axis is not None:
      out[f"run.{axis}"] = parts
    if remat is not None:
      out["model.remat"] = remat
    yield out


def _one(arguments: Sequence[str]) -> dict[str, Any]:
  """The report of one plan, made in a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "plan.json"
    command = [
      sys.executable, "-m", "experiments.plan", *arguments, f"--json={path}",
    ]  # fmt: skip
    try:
      done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False
      )
    except subprocess.TimeoutExpired:
      return {"error": f"no answer in {SECONDS} s"}
    if done.returncode or not path.exists():
      lines = done.stderr.strip().splitlines() or ["no reason given"]
      found = [a for a in lines if a.startswith("error: ")] or lines
      return {"error": found[-1].removeprefix("error: ")[:200]}
    return json.loads(path.read_text(encoding="utf-8"))


def rank(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """What fits first, the fastest bound first, then the least memory."""

  def order(one):
    memory = one.get("memory")
    if memory is None:
      return (2, 0.0, 0.0)
    step = one.get("bounds", {}).get("step", float("inf"))
    return (0 if memory["fits"] else 1, step, memory["needed"])

  return sorted(found, key=order)


def search_table(found: Sequence[Mapping[str, Any]]) -> str:
  """The candidates of a search, best first."""
  rows = []
  for i, one in enumerate(found):
    tried = one["tried"]
    name = tried["run.rules"]
    sizes = [
      f"{axis} {tried[f'run.{axis}']}"
      for axis in ("fsdp", "tensor", "context")
      if tried.get(f"run.{axis}")
    ]
    name += f" ({', '.join(sizes)})" if sizes else ""
    accumulation = next(v for k, v in tried.items() if "accumulation" in k)
    cells = [i + 1, name, accumulation, tried.get("model.remat", "")]
    if "error" in one:
      rows.append((*cells, one["error"], "", "", ""))
      continue
    bounds = one.get("bounds")
    rows.append((
      *cells,
      "fits" if one["memory"]["fits"] else "does not fit",
      _size(one["memory"]["needed"]),
      _time(bounds["step"]) if bounds else "",
      bounds["binding"] if bounds else "",
    ))  # fmt: skip
  head = (
    "rank", "rules", "accumulation", "remat", "", "a chip", "step at least",
    "binding",
  )  # fmt: skip
  return "\n".join(_table(head, rows)) + "\n"


def search(
  config: Any,
  topology: chips_lib.Topology,
  stage: str,
  arguments: Sequence[str],
) -> list[Mapping[str, Any]]:
  """Plans every candidate, each in its own process, and ranks them.

  What does not hold its state alone is not compiled.

  Args:
    config: a config of `configs/`.
    topology: the slice.
    stage: its block.
    arguments: of this program, without `--search` and files.
  """
  found = []
  tries = list(candidates(config, stage, topology))
  for i, tried in enumerate(tries):
    overrides = [f"--config.{k}={v}" for k, v in tried.items()]
    print(
      f"{i + 1}/{len(tries)} {' '.join(f'{k}={v}' for k, v in tried.items())}",
      file=sys.stderr,
      flush=True,
    )
    one = _one([*arguments, *overrides, "--nocompile"])
    if "error" not in one and one["memory"]["fits"]:
      one = _one([*arguments, *overrides])
    found.append({**one, "tried": tried})
  return rank(found)


# --- the command --------------------------------------------------------------


def _write(path: str | None, text: str) -> None:
  if path:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(text, encoding="utf-8")


def _arguments(overrides: Sequence[str]) -> list[str]:
  """This command without what a candidate or a reader must not repeat."""
  out = [
    f"--config={entry.config_flag()}",
    f"--topology={_TOPOLOGY.value}",
    *(f"--config.{o}" for o in overrides),
  ]
  if _STAGE.value:
    out.append(f"--stage={_STAGE.value}")
  if _UPDATES.value:
    out.append(f"--updates={','.join(_UPDATES.value)}")
  return out


def run(overrides: Sequence[str]) -> None:
  """Plans what the flags say."""
  config = config_lib.load(entry.config_flag(), overrides)
  topology = plan.topology(_TOPOLOGY.value)
  scaling = [
    plan.topology(f"{topology.kind}:{shape}") for shape in _SCALING.value
  ]
  arguments = _arguments(overrides)
  command = " ".join(["python -m experiments.plan", *arguments])
  devices = plan.devices(topology.name)
  if _SEARCH.value:
    names = list(config.stages)
    stage = _STAGE.value or names[-1]
    if stage not in names:
      raise ValueError(f"plan: stage must be one of {names}, got {stage!r}")
    found = search(config, topology, stage, arguments)
    text = f"`{command} --search`\n\n{search_table(found)}"
    print(text)
    _write(_MARKDOWN.value, f"# {config.title}: a search\n\n{text}")
    _write(_JSON.value, json.dumps(found, indent=2) + "\n")
    return
  mesh = job_lib.make_mesh(config.run, devices)
  out = report(
    config,
    topology,
    mesh,
    stage=_STAGE.value,
    updates=_UPDATES.value,
    compile_step=_COMPILE.value,
    hlo_file=_HLO.value,
  )
  if scaling and "bounds" in out:
    out["scaling"] = plan.weak_scaling(
      out, [t.name.partition(":")[2] for t in scaling]
    )
    command += f" --scaling={','.join(_SCALING.value)}"
  out = {"command": command, **out}
  print(markdown(out))
  _write(_MARKDOWN.value, markdown(out))
  _write(_JSON.value, json.dumps(out, indent=2) + "\n")


def main(argv: list[str], overrides: list[str]) -> None:
  """Reads flags, plans, or says in one line why not."""
  logging.set_verbosity(logging.WARNING)
  if len(argv) > 1:
    entry.stop(f"unknown argument {argv[1]!r}; flags begin with --", 2)
  if not entry.config_flag() or not _TOPOLOGY.value:
    entry.stop("give --config=configs/<name>.py and --topology=v5p:8x8x8", 2)
  try:
    run(overrides)
  except (ValueError, OSError) as e:
    if "\n" in str(e):
      raise
    entry.stop(f"error: {e}", 1)


if __name__ == "__main__":
  entry.run(main)
