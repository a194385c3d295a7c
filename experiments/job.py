"""From a config to stages, from final parameters to scores and a report."""

import importlib.metadata
import inspect
import json
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import _checks, methods, models, processes, train
from distilljax.train import config as config_lib
from distilljax.train import diagnostics, report, sharding
from distilljax.train.hooks import Every
from experiments import images, plane

PATHS = {
  "rectified_flow": processes.RectifiedFlow,
  "edm": processes.EDM,
  "trigflow": processes.TrigFlow,
}
STAGE_KEYS = (
  "method",
  "hyper",
  "ema_warmup",
  "networks",
  "data",
  "data_rows",
  "steps",
  "batch_size",
  "optimizers",
  "accumulation",
)
NETWORK_KEYS = ("start", "second_time", "head_width", "correction", "model")
TOP_KEYS = ("seed", "title", "data", "model", "stages", "run", "evaluation")


class Job(NamedTuple):
  """A config made concrete.

  Attributes:
    config: the locked config.
    problem: data, scores, pictures.
    stages: what is trained, in order.
  """

  config: Any
  problem: Any
  stages: list[train.Stage]


def build(
  config: Any,
  log: Callable[[str], None] = print,
  mesh: jax.sharding.Mesh | None = None,
  problem: Any = None,
) -> Job:
  """Checks a config and makes its stages; nothing is trained.

  Args:
    config: a config of `configs/`.
    log: gets one line for everything a person should know.
    mesh: that the batch must divide over; None is that of the config.
    problem: in the place of what `config.data` names.

  Raises:
    ValueError: one line for the first thing that cannot be.
  """
  mesh = make_mesh(config.run) if mesh is None else mesh
  devices = train.row_parts(mesh)
  config_lib.known("", config, (*TOP_KEYS, *config.stages))
  if problem is None:
    problem_class = (
      plane.PlaneProblem
      if config.data.name in plane.MIXTURES
      else images.ImageProblem
    )
    problem = problem_class(config.data, config.evaluation, log)
  stages = []
  for stage_name in config.stages:
    if stage_name not in config:
      raise ValueError(
        f"config: stage {stage_name!r} has no block of that name"
      )
    earlier = [s.name for s in stages]
    stages.append(_stage(config, problem, stage_name, earlier, devices))
  return Job(config, problem, stages)


def _network(config, problem, spec, prediction) -> Callable[[Any], Any]:
  """key -> Network of one entry of a stage's `networks`."""

  def make(key):
    if spec["start"] == "exact" and not spec.get("correction"):
      return problem.exact(prediction)
    block = {**config.model.to_dict(), **spec.get("model", {})}
    hyper = {**problem.model(block), **block}
    kind = hyper.pop("kind")
    if spec.get("second_time"):
      hyper["second_time"] = True
    if spec.get("correction"):
      hyper["zero_head"] = True
    network = models.make(kind, train.named_key(key, "network"), **hyper)
    if spec.get("correction"):
      exact = problem.exact(prediction)
      inner = network.apply_fn
      network = models.from_callable(
        lambda p, x, t, **c: exact.apply_fn({}, x, t) + inner(p, x, t, **c),
        network.params,
      )
    if spec.get("head_width"):
      head = models.make(
        "head",
        train.named_key(key, "head"),
        features=models.feature_dim(network, problem.sample_shape),
        width=spec["head_width"],
      )
      network = models.with_head(network, head)
    return network

  return make


def apply_fn_of(make: Callable[[Any], Any]) -> Callable[..., Any]:
  """The network's function, without making its parameters."""
  box = []

  def trace(key):
    box.append(make(key))
    return box[-1].params

  jax.eval_shape(trace, jax.random.key(0))
  return box[-1].apply_fn


def _hyper(block, problem, stage_name) -> dict[str, Any]:
  """The method's hyper-parameters, with names turned into objects."""
  module = methods.get(block.method)
  hyper = block.hyper.to_dict()
  config_lib.known(f"{stage_name}.hyper", hyper, module.DEFAULTS)
  if "path" in hyper:
    if hyper["path"] not in PATHS:
      raise ValueError(
        f"config: {stage_name}.hyper.path must be one of {sorted(PATHS)}, got"
        f" {hyper['path']!r}"
      )
    hyper["path"] = PATHS[hyper["path"]]()
  if "null_label" in module.DEFAULTS and "null_label" not in hyper:
    hyper["null_label"] = problem.null_label
  if block.get("ema_warmup") and "ema_decay" in hyper:
    hyper["ema_decay"] = train.ema_decay(hyper["ema_decay"])
  return hyper


def make_optimizers(
  block: Any, name: str, method: train.Method
) -> dict[str, Any]:
  """Optimizers of a stage by network; one line for what cannot be."""
  cycle = method.schedule.cycle
  optimizers = {}
  for network in method.named(train.Trained):
    if network not in block.optimizers:
      raise ValueError(
        f"config: {name}.optimizers has no entry for {network!r}"
      )
    share = sum(network in entry for entry in cycle) / len(cycle)
    values = block.optimizers[network].to_dict()
    allowed = inspect.signature(train.make_optimizer).parameters
    config_lib.known(f"{name}.optimizers.{network}", values, allowed)
    optimizers[network] = train.make_optimizer(
      **{"steps": max(1, round(block.steps * share)), **values}
    )
  return optimizers


def step_options(block: Any, run: Any, method: train.Method) -> dict[str, Any]:
  """What a config says about a stage's train step."""
  dtypes = {"float32": None, "bfloat16": jnp.bfloat16}
  out = {
    "accumulation": block.get("accumulation") or 1,
    "unroll": run.get("unroll", True),
    "rules": rules_for(run, method.networks),
  }
  for field in ("compute_dtype", "frozen_dtype"):
    name = run.get(field) or "float32"
    if name not in dtypes:
      raise ValueError(
        f"config: run.{field} must be one of {sorted(dtypes)}, got {name!r}"
      )
    out[field] = dtypes[name]
  return out


def rows_of(block: Any, config: Any, name: str, devices: int) -> int:
  """Batch size of a stage; one line if it does not divide over devices."""
  batch_size = block.get("batch_size") or config.data.batch_size
  accumulation = block.get("accumulation") or 1
  unit = devices * accumulation
  if batch_size % unit:
    times = f" x accumulation {accumulation}" if accumulation > 1 else ""
    raise ValueError(
      f"config: {name}: batch size must be divisible by {devices} devices"
      f"{times}, got {batch_size}; nearest:"
      f" {sharding.nearest_multiple(batch_size, unit)}"
    )
  return batch_size


def best_of(
  config: Any, problem: Any, name: str = "eval/{}"
) -> train.Best | None:
  """The checkpoint that `run.keep_best` keeps; one line for what cannot be.

  Args:
    config: the config.
    problem: says what can be watched.
    name: what the watches call a metric.
  """
  metric = config.run.get("keep_best")
  if not metric:
    return None
  if metric not in problem.watchable:
    raise ValueError(
      f"config: run.keep_best must be one of {problem.watchable}, got"
      f" {metric!r}{_checks.nearest(metric, problem.watchable)}"
    )
  if not config.evaluation.watches:
    raise ValueError(
      f"config: run.keep_best={metric!r} needs evaluation.watches >= 1, got 0"
    )
  return train.Best(name.format(metric), report.higher_is_better(metric))


def _stage(config, problem, name, earlier, devices) -> train.Stage:
  block = config[name]
  config_lib.known(name, block, STAGE_KEYS)
  specs = {k: v.to_dict() for k, v in block.networks.items()}
  for network, spec in specs.items():
    config_lib.known(f"{name}.networks.{network}", spec, NETWORK_KEYS)
    starts = ["scratch", "exact", *earlier]
    if spec.get("start") not in starts:
      raise ValueError(
        f"config: {name}.networks.{network}.start must be one of {starts}, got"
        f" {spec.get('start')!r}"
      )
  hyper = _hyper(block, problem, name)
  prediction = hyper.get("prediction", "velocity")
  makers = {
    k: _network(config, problem, s, prediction) for k, s in specs.items()
  }
  method = methods.get(block.method).make(
    {k: apply_fn_of(m) for k, m in makers.items()}, **hyper
  )

  def init(key, results):
    params = {}
    for network, spec in specs.items():
      made = makers[network](train.named_key(key, network))
      if spec["start"] in ("scratch", "exact"):
        params[network] = made.params
      else:
        source = results[spec["start"]]
        params[network] = models.transfer(
          source.get("ema", source.get("student")), made.params
        )
    return params

  batch_size = rows_of(block, config, name, devices)
  return train.Stage(
    name=name,
    method=method,
    optimizers=make_optimizers(block, name, method),
    data=problem.batches(
      batch_size,
      config.seed,
      block.get("data") or "samples",
      block.get("data_rows") or config.data.rows,
    ),
    steps=block.steps,
    init=init,
    options=step_options(block, config.run, method),
    best=best_of(config, problem, _watch_name(config, name)),
  )


def sample(
  method: train.Method,
  params: Mapping[str, Any],
  inputs: Mapping[str, Any],
  *,
  steps: int,
  batch: int,
) -> np.ndarray:
  """Samples for all inputs, `batch` at a time."""
  n = len(inputs["noise"])
  key = jax.random.key(0, impl="threefry2x32")
  out = []
  for i in range(0, n, batch):
    part = {k: v[i : i + batch] for k, v in inputs.items()}
    made = method.sample(params, part, jax.random.fold_in(key, i), steps=steps)
    out.append(np.asarray(made))
  return np.concatenate(out)


class _Watch:
  """During training: headline and best score, and a strip of samples."""

  def __init__(self, job, stage, workdir):
    self.job, self.stage = job, stage
    config, evaluation = job.config, job.config.evaluation
    names = [job.problem.headline, config.run.get("keep_best")]
    self.metrics = dict.fromkeys(filter(None, names))
    self.name = _watch_name(config, stage.name)
    self.steps = _steps_of(config, stage.name)[0]
    self.inputs = job.problem.inputs(
      evaluation.watch_n, jax.random.key(evaluation.noise_seed)
    )
    self.batch = evaluation.batch
    self.folder = workdir / "samples"

  def __call__(self, moment):
    if moment.stage.name != self.stage.name:
      return None
    params = gathered({**moment.frozen, **moment.state.params})
    x = sample(
      self.stage.method,
      params,
      self.inputs,
      steps=self.steps,
      batch=self.batch,
    )
    if jax.process_index() == 0:
      self.folder.mkdir(exist_ok=True)
      np.save(self.folder / f"{self.stage.name}_{moment.step:07d}.npy", x[:40])
    scores = self.job.problem.score(x, self.inputs)
    return {self.name.format(m): scores[m] for m in self.metrics}


def _watch_name(config: Any, stage: str) -> str:
  return f"eval/{{}}_{_steps_of(config, stage)[0]}_steps"


def _steps_of(config: Any, stage: str) -> tuple[int, ...]:
  evaluation = config.evaluation
  if stage == "teacher":
    return tuple(evaluation.teacher_steps)
  return tuple(evaluation.student_steps)


def versions() -> dict[str, str]:
  """Versions of what a result depends on."""
  names = ("distilljax", "jax", "jaxlib", "flax", "optax", "numpy")
  return {
    "python": platform.python_version(),
    **{n: importlib.metadata.version(n) for n in names},
  }


def train_and_evaluate(
  config: Any,
  workdir: str | os.PathLike,
  *,
  command: str = "",
  mesh: jax.sharding.Mesh | None = None,
  log: Callable[[str], None] = print,
  hooks: Sequence[train.Hook] = (),
) -> dict[str, Any]:
  """Runs a config: trains its stages, scores them, writes the report.

  Writes config.json, metrics.jsonl, checkpoints/, samples/, summary.json and
  report.html into `workdir`; called again it resumes, or returns the summary
  of the finished run.

  Args:
    config: a config of `configs/`.
    workdir: folder of the run.
    command: the shell command, for the report.
    mesh: devices; None is all of them.
    log: gets one line for everything a person should know.
    hooks: further hooks of the training loop.

  Returns:
    The content of summary.json.

  Raises:
    ValueError: a config or folder that cannot be used, one line.
    train.Interrupted: after SIGINT or SIGTERM during training; saved.
  """
  workdir = pathlib.Path(workdir)
  log = log if jax.process_index() == 0 else silent
  mesh = make_mesh(config.run) if mesh is None else mesh
  job = build(config, log, mesh)
  claim(workdir, config)
  if (done := finished_summary(workdir, log)) is not None:
    return done
  headline = job.problem.headline
  evaluation = config.evaluation
  watches = [
    Every(max(1, stage.steps // evaluation.watches), watch)
    for stage in job.stages
    if evaluation.watches
    for watch in [_Watch(job, stage, workdir)]
  ]
  before = now()
  if evaluation.watches:
    job.problem.facts()  # the classifier, before the bars begin
  judged = since(before)
  result = run_stages(job, workdir, mesh, [*watches, *hooks], log)
  memory = peak_memory(mesh)
  # The evaluation is every process's own; the first one writes it down.
  result = result._replace(params=gathered(result.params))
  before = now()
  scores, rows = _evaluate(job, result, log)
  summary = {
    "scores": scores,
    "floors": job.problem.floors(),
    **job.problem.facts(),
  }
  spent = {"judge": judged, "evaluation": since(before)}
  summary |= facts_of(job, result, mesh, memory, spent, job.stages)
  diagnosis, hints = diagnostics.fake_score(workdir / "metrics.jsonl")
  if hints:
    summary["hints"] = hints
  publish(
    job,
    workdir,
    summary,
    lead=_lead(job, summary, headline),
    figures=[*_figures(job, workdir, rows, headline), *diagnosis],
    command=command,
    reached=_reached(summary, headline),
    log=log,
  )
  return summary


def silent(line: str) -> None:
  """The log of every process but the first."""
  del line


def make_mesh(
  run: Any, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
  """The mesh that a config's block `run` asks for.

  Args:
    run: the block.
    devices: None is all that there are.
  """
  names = set(rule_names(run))
  fsdp = (run.get("fsdp") or None) if any("fsdp" in n for n in names) else 1
  others = {name: run.get(name) or 1 for name in ("tensor", "context")}
  return train.make_mesh(devices, fsdp=fsdp, **others)


def rule_names(run: Any) -> list[str]:
  """The sharding rules that a block `run` names."""
  rules = run.get("rules") or "dp"
  return [rules] if isinstance(rules, str) else list(rules.values())


def rules_for(run: Any, networks: Iterable[str]) -> str | dict[str, str]:
  """The rules of a stage: those of networks that it does not have, left out."""
  rules = run.get("rules") or "dp"
  if isinstance(rules, str):
    return rules
  return {k: v for k, v in rules.items() if k in networks}


def claim(workdir: pathlib.Path, config: Any) -> None:
  """Takes the folder: the first process writes, then the others look."""
  if jax.process_index() == 0:
    config_lib.claim_workdir(workdir, config)
  train.barrier("claim")
  if jax.process_index() != 0:
    config_lib.claim_workdir(workdir, config)


def gathered(params: Any) -> Any:
  """Parameters for programs of one device, where they lie on several."""
  return train.gather(params) if jax.process_count() > 1 else params


def facts_of(
  job: Any,
  result: train.Result,
  mesh: jax.sharding.Mesh,
  memory: Any,
  spent: Mapping[str, tuple[float, float]],
  counted: Sequence[train.Stage],
) -> dict[str, Any]:
  """What the summary of every job says of its run, beside the scores.

  Args:
    job: has `config` and `stages`.
    result: of the stages, parameters gathered.
    mesh: of the run.
    memory: of `peak_memory`.
    spent: (wall, CPU) seconds by what else was done.
    counted: stages whose parameters are counted.
  """
  config = job.config
  final = result.params[job.stages[-1].name]["student"]
  facts = {
    "config_title": config.title,
    "params_sha256": train.params_sha256(final),
    "versions": versions(),
    "seed": config.seed,
    "skipped": result.skipped,
    "devices": mesh.size,
    "compile_seconds": result.compile_seconds,
    "peak_memory_bytes": memory,
    "parameters": {
      f"{stage.name}/{network}": models.count_params(params)
      for stage in counted
      for network, params in result.params[stage.name].items()
    },
  }
  for i, field in enumerate(("seconds", "cpu_seconds")):
    more = {k: v[i] for k, v in spent.items()}
    facts[field] = {**getattr(result, field), **more}
  if result.best:
    facts["best"] = result.best
  return facts


def finished_summary(
  workdir: pathlib.Path, log: Callable[[str], None]
) -> dict[str, Any] | None:
  """The summary of a run that has ended in this folder, None if none has."""
  path = workdir / "summary.json"
  if not path.exists():
    return None
  log(f"finished before: nothing to train. Report: {workdir / 'report.html'}")
  return json.loads(path.read_text())


def run_stages(
  job: Any,
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
  hooks: Sequence[train.Hook],
  log: Callable[[str], None],
) -> train.Result:
  """Trains a job's stages as its config's block `run` says, with progress."""
  run = job.config.run
  return train.run(
    job.stages,
    workdir,
    seed=job.config.seed,
    mesh=mesh,
    log_every=run.log_every,
    checkpoint_every=run.checkpoint_every,
    keep=run.keep,
    max_skips_in_a_row=run.max_skips_in_a_row,
    hooks=[train.Progress(), *hooks],
    log=log,
  )


def publish(
  job: Any,
  workdir: pathlib.Path,
  summary: Mapping[str, Any],
  *,
  lead: str,
  figures: Sequence[report.Figure],
  command: str,
  reached: str,
  log: Callable[[str], None],
) -> None:
  """Writes report.html, then summary.json: a run that has it is finished."""
  if jax.process_index() != 0:
    return
  page = report.write_report(
    workdir,
    title=job.config.title,
    lead=lead,
    summary={**summary, "config": job.config.to_dict()},
    figures=figures,
    command=command,
  )
  report.write_atomically(
    workdir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode()
  )
  log(f"{reached} Report: {page}")


def now() -> tuple[float, float]:
  """Wall and CPU clock."""
  return time.monotonic(), time.process_time()


def since(before: tuple[float, float]) -> tuple[float, float]:
  """Wall and CPU seconds since `now`."""
  return tuple(b - a for a, b in zip(before, now()))


def peak_memory(mesh: jax.sharding.Mesh) -> dict[str, int]:
  """Most bytes held until now: by this process, and by a device of its own.

  Args:
    mesh: whose devices are asked; a CPU has no memory but the host's.

  Returns:
    {"host": resident bytes} and, of the fullest device, "device".
  """
  unit = 1 if sys.platform == "darwin" else 1024
  out = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
  found = [(d.memory_stats() or {}) for d in mesh.local_devices]
  peaks = [s["peak_bytes_in_use"] for s in found if "peak_bytes_in_use" in s]
  return {**out, "device": max(peaks)} if peaks else out


def _evaluate(job: Job, result: train.Result, log) -> tuple[list, list]:
  """Scores of every model and number of steps, and samples for the pictures."""
  evaluation = job.config.evaluation
  inputs = job.problem.inputs(
    evaluation.n, jax.random.key(evaluation.noise_seed)
  )
  scores, rows = [], [job.problem.real()]
  shown = [(s.name, s.method, result.params[s.name]) for s in job.stages]
  exact = job.problem.exact(prediction="velocity")
  if "teacher" not in job.config.stages and exact is not None:
    teacher = methods.get("flow_matching").make({"student": exact.apply_fn})
    shown.insert(0, ("teacher", teacher, {"ema": {}}))
  for name, method, params in shown:
    if name not in ("teacher", job.stages[-1].name):
      continue  # a warm-up is a means
    model = "teacher" if name == "teacher" else "student"
    for steps in _steps_of(job.config, name):
      x = sample(method, params, inputs, steps=steps, batch=evaluation.batch)
      words = f"{model}, {steps} step{'s' if steps > 1 else ''}"
      log(f"scoring {words}")
      rows.append((words, x[:2000]))
      for metric, value in job.problem.score(x, inputs).items():
        scores.append(
          {
            "model": model,
            "steps": steps,
            "metric": metric,
            "value": value,
            "n": len(x),
          }
        )
  return scores, rows


def _get(rows, metric, model=None, steps=None) -> float | None:
  for row in rows:
    if row["metric"] == metric and model in (None, row["model"]):
      if steps in (None, row["steps"]):
        return row["value"]
  return None


def _reached(summary, headline) -> str:
  parts = []
  for row in summary["scores"]:
    if row["metric"] == headline:
      plural = "s" if row["steps"] > 1 else ""
      parts.append(
        f"{row['model']} at {row['steps']} step{plural} {row['value']:.3g}"
      )
  floor = _get(summary["floors"], headline)
  return f"reached {headline}: {', '.join(parts)} (floor {floor:.2g})."


def _lead(job: Job, summary, headline) -> str:
  stages = ", then ".join(
    f"{s.name} by {s.method.name} ({s.method.paper}), {s.steps} steps"
    for s in job.stages
  )
  wall = sum(summary["seconds"].values())
  return (
    f"Trained on {job.config.data.name}: {stages}; seed {summary['seed']}, one"
    f" run, {wall:.0f} s in all on {summary['devices']} device(s)."
    f" {_reached(summary, headline)[0].upper()}"
    f"{_reached(summary, headline)[1:]}"
    f" Scores use n = {job.config.evaluation.n} samples from the final"
    " averaged weights; one seed says nothing about the spread over seeds."
  )


def _figures(job: Job, workdir: pathlib.Path, rows, headline):
  figures = list(job.problem.picture(rows))
  for stage in job.stages:
    files = sorted((workdir / "samples").glob(f"{stage.name}_*.npy"))
    if len(files) > 1:
      steps = _steps_of(job.config, stage.name)[0]
      strip = [
        (f"step {int(f.stem.rsplit('_', 1)[1])}", np.load(f)) for f in files
      ]
      figures += job.problem.picture(
        strip,
        title=f"{stage.name} while it trains",
        caption=(
          f"Samples at {steps} step(s) from the same latents through the"
          " training of the stage."
        ),
      )
  return figures + report.curves(workdir / "metrics.jsonl")
