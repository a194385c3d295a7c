"""From a config of language models to stages, scores and a report.

A stage with `repeat` is trained `seeds` times, as `<name>_0`, `<name>_1`, ...:
what starts from a repeated stage starts from its own repetition, and the scores
are means over repetitions with their spread.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from distilljax import lm, methods, models, train
from distilljax.train import config as config_lib
from distilljax.train import report
from distilljax.train.hooks import Every
from experiments import job as job_lib
from experiments import language, language_figures
from experiments.language import Model

STAGE_KEYS = (
  "method",
  "steps",
  "networks",
  "optimizers",
  "hyper",
  "repeat",
  "data",
  "batch_size",
  "accumulation",
)
NETWORK_KEYS = ("start", "model")
TOP_KEYS = (
  "seed",
  "seeds",
  "title",
  "data",
  "task",
  "model",
  "stages",
  "run",
  "evaluation",
)


class Job(NamedTuple):
  """A config made concrete.

  Attributes:
    config: the locked config.
    problem: task, batches, scores.
    stages: what is trained, in order.
    blocks: (block's name, repetition) of each stage.
    networks: of each block, the apply function of its student.
  """

  config: Any
  problem: Any
  stages: list[train.Stage]
  blocks: dict[str, tuple[str, int]]
  networks: dict[str, Callable[..., Any]]


class _Builder:
  """Makes the stages of a config."""

  def __init__(self, config, devices, problem=None):
    self.config = config
    self.devices = devices
    self.problem = problem or language.make_problem(config)
    self._apply_fns = {}

  def hyper_of(self, block: str, network: str) -> dict[str, Any]:
    """The network's values: its own, or those of what it starts from."""
    spec = self.config[block].networks[network]
    own = dict(spec.get("model") or {})
    start = spec["start"]
    if not own and start in self.config.stages:
      return self.hyper_of(start, "student")
    values = {**self.config.model.to_dict(), **own}
    return {**self.problem.model(values), **values}

  def apply_fn(self, hyper: dict[str, Any]) -> Callable[..., Any]:
    """One function for equal networks: their programs are then shared."""
    name = json.dumps(hyper, sort_keys=True)
    if name not in self._apply_fns:
      self._apply_fns[name] = job_lib.apply_fn_of(
        lambda key: language.make_network(hyper, key)
      )
    return self._apply_fns[name]

  def stage(self, name: str, replicate: int, earlier: list[str]):
    """One `train.Stage`."""
    config, problem = self.config, self.problem
    block = config[name]
    config_lib.known(name, block, STAGE_KEYS)
    specs = {k: v.to_dict() for k, v in block.networks.items()}
    starts = ["scratch", *problem.known, *earlier]
    for network, spec in specs.items():
      config_lib.known(f"{name}.networks.{network}", spec, NETWORK_KEYS)
      if spec.get("start") not in starts:
        raise ValueError(
          f"config: {name}.networks.{network}.start must be one of {starts},"
          f" got {spec.get('start')!r}"
        )
    module = methods.get(block.method)
    hyper = block.hyper.to_dict()
    config_lib.known(f"{name}.hyper", hyper, module.DEFAULTS)
    given = {**problem.sampler(), **hyper}
    given = {k: v for k, v in given.items() if k in module.DEFAULTS}
    for function, value in problem.functions(hyper).items():
      if function in module.DEFAULTS:
        given[function] = value
    values = {k: self.hyper_of(name, k) for k in specs}
    _check_settings(name, {**module.DEFAULTS, **given}, values, problem)
    method = module.make(
      {k: self.apply_fn(v) for k, v in values.items()}, **given
    )

    def init(key, results):
      params = {}
      for network, spec in specs.items():
        start = spec["start"]
        made = language.make_network(
          values[network], train.named_key(key, network)
        ).params
        if start in problem.known and start not in config.stages:
          made = models.transfer(problem.known_params(start, replicate), made)
        elif start != "scratch":
          again = config[start].get("repeat")
          source = f"{start}_{replicate}" if again else start
          made = models.transfer(results[source]["student"], made)
        params[network] = made
      return params

    return train.Stage(
      name=f"{name}_{replicate}" if block.get("repeat") else name,
      method=method,
      optimizers=job_lib.make_optimizers(block, name, method),
      data=problem.batches(
        job_lib.rows_of(block, config, name, self.devices),
        config.seed + replicate,
        block.get("data") or {},
      ),
      steps=block.steps,
      init=init,
      options=job_lib.step_options(block, config.run, method),
      best=job_lib.best_of(config, problem),
    )


def _check_settings(name, hyper, networks, problem):
  """Sampler, teacher and loss of a stage, before anything is trained."""
  task = getattr(problem, "task", None)
  vocabulary = None
  if task is not None:
    vocabulary = lm.tokenizer_fingerprint(task.vocab)
  common = {
    "padding_side": "left",
    "eos_id": hyper.get("eos_id"),
    "pad_id": hyper.get("pad_id"),
    "tokenizer": vocabulary,
  }
  of = lambda k: lm.Settings(**common, vocab_size=networks[k]["vocab_size"])
  # A loss that is an expectation under the sampled distribution itself.
  own = hyper.get("form") == "sampled" or "credit" in hyper
  loss = lm.Settings(
    temperature=1.0 if own else None,
    top_k=0 if own else None,
    top_p=1.0 if own else None,
    eos_id=problem.sampler()["eos_id"],
    pad_id=problem.sampler()["pad_id"],
  )
  try:
    lm.check_settings(
      sampler=of("student")._replace(
        temperature=hyper.get("sampling_temperature"),
        top_k=hyper.get("top_k") or 0,
        top_p=1.0 if hyper.get("top_p") is None else hyper["top_p"],
      ),
      teacher=of("teacher") if "teacher" in networks else None,
      loss=loss,
    )
  except ValueError as e:
    raise ValueError(f"config: {name}: {e}") from None


def build(
  config: Any,
  log: Callable[[str], None] = print,
  mesh: jax.sharding.Mesh | None = None,
  problem: Any = None,
) -> Job:
  """Checks a config and makes its stages; nothing is trained.

  Args:
    config: a config of `configs/`.
    log: unused: nothing here takes long.
    mesh: that the batch must divide over; None is that of the config.
    problem: in the place of what `config.data` names.

  Raises:
    ValueError: one line for the first thing that cannot be.
  """
  del log
  mesh = job_lib.make_mesh(config.run) if mesh is None else mesh
  devices = train.row_parts(mesh)
  config_lib.known("", config, (*TOP_KEYS, *config.stages))
  if config.seeds < 1:
    raise ValueError(f"config: seeds must be >= 1, got {config.seeds}")
  builder = _Builder(config, devices, problem)
  stages, blocks, networks = [], {}, {}
  for i, name in enumerate(config.stages):
    if name not in config:
      raise ValueError(f"config: stage {name!r} has no block of that name")
    count = config.seeds if config[name].get("repeat") else 1
    for replicate in range(count):
      stage = builder.stage(name, replicate, list(config.stages[:i]))
      stages.append(stage)
      blocks[stage.name] = (name, replicate)
    networks[name] = builder.apply_fn(builder.hyper_of(name, "student"))
  evaluation = config.evaluation
  known = (*config.stages, *builder.problem.known)
  for entry in (*evaluation.models, evaluation.teacher):
    if entry is not None and entry not in known:
      raise ValueError(
        f"config: evaluation names {entry!r}, which must be one of {known}"
      )
  # Repetitions of a later block follow all those of an earlier one.
  return Job(config, builder.problem, stages, blocks, networks)


def _models(job: Job, params: Mapping[str, Any]) -> dict[str, list[Model]]:
  """Block or known name -> its models, a repetition each."""
  out: dict[str, list[Model]] = {}
  for stage, (block, replicate) in job.blocks.items():
    out.setdefault(block, []).append(
      Model(block, job.networks[block], params[stage]["student"], replicate)
    )
  apply = next(iter(job.networks.values()))
  for name in job.problem.known:
    if name not in out:
      out[name] = [
        Model(name, apply, job.problem.known_params(name, i), i)
        for i in range(job.config.seeds)
      ]
  return out


def _evaluate(job: Job, of: Mapping[str, list[Model]], log) -> list[dict]:
  """Score rows: means over repetitions, with spread and values."""
  evaluation = job.config.evaluation
  scores = []
  for name in evaluation.models:
    found = []
    log(f"scoring {name}")
    for model in of[name]:
      teacher = evaluation.teacher
      if teacher is not None:
        repeated = of[teacher]
        teacher = repeated[min(model.replicate, len(repeated) - 1)]
      found.append(job.problem.score(model, teacher))
    for metric in found[0]:
      values = [f[metric] for f in found]
      row = {
        "model": evaluation.labels.get(name, name),
        "steps": None,
        "metric": metric,
        "value": float(np.mean(values)),
        "n": evaluation.n,
      }
      if len(values) > 1:
        row["spread"] = float(np.std(values, ddof=1))
        row["values"] = values
      scores.append(row)
  # The headline is what the report's tiles and chart show.
  headline = job.problem.headline
  return sorted(scores, key=lambda r: r["metric"] != headline)


class _Watch:
  """During training: a cheap score of the stage's student."""

  def __init__(self, job, stage):
    self.job, self.stage = job, stage

  def __call__(self, moment):
    if moment.stage.name != self.stage.name:
      return None
    block, replicate = self.job.blocks[self.stage.name]
    params = job_lib.gathered(moment.state.params["student"])
    model = Model(block, self.job.networks[block], params, replicate)
    found = self.job.problem.watched(model)
    return {f"eval/{k}": v for k, v in found.items()}


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

  Writes config.json, metrics.jsonl, checkpoints/, summary.json and report.html
  into `workdir`; called again it resumes, or returns the summary of the
  finished run.

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
  log = log if jax.process_index() == 0 else job_lib.silent
  mesh = job_lib.make_mesh(config.run) if mesh is None else mesh
  job = build(config, log, mesh)
  job_lib.claim(workdir, config)
  if (done := job_lib.finished_summary(workdir, log)) is not None:
    return done
  evaluation = config.evaluation
  watches = [
    Every(max(1, stage.steps // evaluation.watches), _Watch(job, stage))
    for stage in job.stages
    if evaluation.watches
  ]
  result = job_lib.run_stages(job, workdir, mesh, [*watches, *hooks], log)
  memory = job_lib.peak_memory(mesh)
  before = job_lib.now()
  # The evaluation's programs are for one device, whatever the mesh was.
  of = _models(job, train.gather(result.params))
  scores = _evaluate(job, of, log)
  summary = {
    "scores": scores,
    "floors": job.problem.floors(),
    "seeds": config.seeds,
    **job.problem.facts(of),
  }
  labels = config.evaluation.labels
  figures = job.problem.figures(
    [of[name][0] for name in evaluation.rollouts],
    {name: labels.get(name, name) for name in evaluation.rollouts},
  )
  figures += _sweep(job, scores, summary)
  spent = {"evaluation": job_lib.since(before)}
  first = [s for s in job.stages if job.blocks[s.name][1] == 0]
  summary |= job_lib.facts_of(job, result, mesh, memory, spent, first)
  job_lib.publish(
    job,
    workdir,
    summary,
    lead=_lead(job, summary),
    figures=figures + _curves(job, workdir),
    command=command,
    reached=_reached(job, summary),
    log=log,
  )
  return summary


def _curves(job: Job, workdir: pathlib.Path) -> list[report.Figure]:
  """Training curves of the first repetition: the others look alike."""
  further = {s for s, (_, i) in job.blocks.items() if i > 0}
  return [
    f
    for f in report.curves(workdir / "metrics.jsonl")
    if f.title.removeprefix("Training: ").split(",")[0] not in further
  ]


def _sweep(job: Job, scores: list[dict], summary) -> list[report.Figure]:
  """Curves over a swept hyper-parameter, where the config names one."""
  wanted = job.config.evaluation.get("sweep")
  if not wanted:
    return []
  wanted = wanted.to_dict()
  names = wanted["stages"]
  labels = job.config.evaluation.labels
  values = [
    float(job.config[name].hyper[wanted["hyper"]]) for name in names
  ]
  rows = {}
  for metric in wanted["metrics"]:
    found = {r["model"]: r for r in scores if r["metric"] == metric}
    rows[metric] = np.array([
      found[labels.get(n, n)].get("values", [found[labels.get(n, n)]["value"]])
      for n in names
    ])
  lines = []
  if "cliff" in summary and np.isfinite(summary["cliff"]["binding"]):
    lines.append(("predicted", summary["cliff"]["binding"]))
  return [
    language_figures.sweep(
      [(m, report.metric_label(m)) for m in wanted["metrics"]],
      values,
      rows,
      lines=lines,
      x_label=wanted["hyper"],
      title=f"Sweep over {wanted['hyper']}",
      caption=(
        f"A point a repetition ({job.config.seeds} of them), a line through"
        " their means."
      ),
    )
  ]


def _reached(job: Job, summary) -> str:
  headline = job.problem.headline
  parts = []
  for row in summary["scores"]:
    if row["metric"] == headline:
      spread = f" ± {row['spread']:.2g}" if "spread" in row else ""
      parts.append(f"{row['model']} {row['value']:.3g}{spread}")
  return f"reached {headline}: {', '.join(parts)}."


def _lead(job: Job, summary) -> str:
  parts = []
  for name in job.config.stages:
    block = job.config[name]
    stage = next(
      s for s in job.stages if job.blocks[s.name] == (name, 0)
    )
    times = f", {job.config.seeds} times" if block.get("repeat") else ""
    parts.append(f"{name} by {block.method} ({stage.method.paper}),"
                 f" {block.steps} steps{times}")
  wall = sum(summary["seconds"].values())
  reached = _reached(job, summary)
  return (
    f"Trained on {job.config.data.name}: {'; '.join(parts)}; seed"
    f" {summary['seed']}, {wall:.0f} s in all on {summary['devices']}"
    f" device(s). {reached[0].upper()}{reached[1:]} ± is the standard"
    " deviation over repetitions; all models are scored on the same held-out"
    " prompts under the same keys."
  )
