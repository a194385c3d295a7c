"""The loop: stages in order, resumed bit for bit, stopped without loss."""

import base64
import hashlib
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from distilljax.train import checkpoint as checkpoint_lib
from distilljax.train import hooks as hooks_lib
from distilljax.train import metrics as metrics_lib
from distilljax.train import sharding
from distilljax.train.method import Context, Frozen, Method, named_key
from distilljax.train.step import make_step
from distilljax.typing import Array, Params


class Stage(NamedTuple):
  """One method trained for a number of steps.

  Attributes:
    name: folder and metric name, unique in the run.
    method: the method.
    optimizers: optax transformations of its trained networks by name.
    data: () -> endless iterator of batches (dicts of NumPy rows) with
      `get_state() -> bytes` and `set_state(bytes)`.
    steps: number of steps.
    init: (key, earlier) -> parameters of the method's networks by name; pure.
      `earlier` maps finished stages' names to their networks' parameters.
    options: keyword arguments of `make_step` (accumulation, unroll, ...).
    best: the checkpoint that is kept beside the newest ones; None is none.
  """

  name: str
  method: Method
  optimizers: Mapping[str, optax.GradientTransformation]
  data: Callable[[], Iterator[Mapping[str, np.ndarray]]]
  steps: int
  init: Callable[[Array, Mapping[str, Any]], Mapping[str, Params]]
  options: Mapping[str, Any] = {}
  best: checkpoint_lib.Best | None = None


class Result(NamedTuple):
  """What a finished run leaves.

  Attributes:
    params: by stage, by network: final parameters (frozen ones included).
    seconds: wall seconds a stage, over all resumes.
    cpu_seconds: CPU seconds a stage.
    compile_seconds: seconds JAX spent compiling, a stage.
    skipped: by "stage/network": updates skipped as not finite.
    best: by stage that has a best checkpoint: its step, metric and value.
  """

  params: dict[str, dict[str, Params]]
  seconds: dict[str, float]
  cpu_seconds: dict[str, float]
  compile_seconds: dict[str, float]
  skipped: dict[str, int]
  best: dict[str, dict[str, Any]]


class Interrupted(Exception):
  """The run was asked to stop; everything is saved."""

  def __init__(self, stage: str, step: int, signum: int):
    super().__init__(
      f"stopped by {signal.Signals(signum).name} in stage {stage} at step"
      f" {step}; saved. The same command resumes."
    )
    self.signum = signum


class LostProcess(RuntimeError):
  """Another process of the run is gone; what was saved last is intact."""


class Diverged(RuntimeError):
  """Too many updates in a row were not finite; the last good state is saved."""


class _StopSignals:
  """Notes SIGINT and SIGTERM while a run is on; the loop acts on them."""

  def __init__(self):
    self.received: int | None = None
    self._before: dict[int, Any] = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._before[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame):
    del frame
    if self.received is not None and number == signal.SIGINT:
      raise KeyboardInterrupt  # asked twice: do not wait for the step
    self.received = number

  def __exit__(self, *exception):
    for number, handler in self._before.items():
      signal.signal(number, handler)


class _Clock:
  """Wall, CPU and compile seconds of a stage, carried over resumes."""

  _compiled = 0.0
  _listening = False

  def __init__(self, carried: Sequence[float] = (0.0, 0.0, 0.0)):
    if not _Clock._listening:
      jax.monitoring.register_event_duration_secs_listener(_Clock._listen)
      _Clock._listening = True
    self._carried = list(carried)
    self._began = self._now()

  @classmethod
  def _listen(cls, event: str, seconds: float, **kwargs) -> None:
    del kwargs
    if event.startswith("/jax/core/compile/"):
      cls._compiled += seconds

  @classmethod
  def _now(cls) -> tuple[float, float, float]:
    return time.monotonic(), time.process_time(), cls._compiled

  def working(self) -> float:
    """Wall seconds without those spent compiling, for rates."""
    wall, _, compiled = self._now()
    return wall - compiled

  def read(self) -> list[float]:
    """Wall, CPU and compile seconds of the stage until now."""
    return [
      c + n - b for c, n, b in zip(self._carried, self._now(), self._began)
    ]


def _agree(received: int | None) -> int | None:
  """The signal that any process was sent."""
  from jax.experimental import multihost_utils  # noqa: PLC0415

  found = multihost_utils.process_allgather(np.int32(received or 0))
  return int(found.max()) or None


def _of_the_first(value: float) -> float:
  """What the first process has measured: all of them decide alike."""
  from jax.experimental import multihost_utils  # noqa: PLC0415

  return float(multihost_utils.process_allgather(np.float32(value))[0])


def params_sha256(params: Params) -> str:
  """SHA-256 of the arrays' bytes in sorted key order.

  Args:
    params: nested dict of arrays.

  Returns:
    64 hexadecimal digits.
  """
  digest = hashlib.sha256()

  def visit(tree):
    if isinstance(tree, Mapping):
      for name in sorted(tree):
        visit(tree[name])
    else:
      for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())

  visit(sharding.gather(params))
  return digest.hexdigest()


def run(
  stages: Sequence[Stage],
  workdir: str | pathlib.Path,
  *,
  seed: int = 0,
  mesh: jax.sharding.Mesh | None = None,
  log_every: int = 50,
  checkpoint_every: int = 500,
  keep: int = 2,
  max_skips_in_a_row: int = 20,
  hooks: Sequence[hooks_lib.Hook] = (),
  log: Callable[[str], None] = print,
) -> Result:
  """Trains the stages in order, resuming where `workdir` says.

  Metrics go to `workdir/metrics.jsonl`, checkpoints to
  `workdir/checkpoints/<stage>`. Parameters, optimizers, EMA, keys and the data
  iterator are restored exactly, so an interrupted run ends in the same bits as
  an uninterrupted one. SIGINT and SIGTERM finish the step, save and raise
  `Interrupted`.

  Files are written while the training goes on. A save waits for the one before,
  and the end of a stage, a signal and an error wait for the last one. So a kill
  costs what was trained since the newest checkpoint that was wholly written:
  the steps between two checkpoints, and those during one write.

  With several processes (`jax.distributed`) every one calls `run` with its own
  rows as data, see `row_shard`; process 0 writes metrics and log lines, a
  signal to any process stops all of them at the next multiple of `log_every`,
  and processes wait for each other around checkpoints only.

  Args:
    stages: what to train, in order.
    workdir: folder of the run.
    seed: seed of every stage's key.
    mesh: devices; None is all of them.
    log_every: steps between metric lines.
    checkpoint_every: steps between checkpoints (a stage's end is always saved).
    keep: newest checkpoints kept, a stage; `Stage.best` keeps one more.
    max_skips_in_a_row: a network skipped more often in a row stops the run.
    hooks: called around steps.
    log: gets one line for everything a person should know.

  Returns:
    The final parameters and what the run cost.

  Raises:
    Interrupted: after a signal, when everything is saved.
    Diverged: too many non-finite updates in a row; the good state is saved.
    LostProcess: another process is gone, or an exchange with it failed.
    checkpoint.SaveError: a checkpoint could not be written; raised at the
      first step after the failure is known.
  """
  workdir = pathlib.Path(workdir)
  first = jax.process_index() == 0
  if not first:
    log = lambda line: None
  mesh = sharding.make_mesh() if mesh is None else mesh
  names = [s.name for s in stages]
  if len(set(names)) != len(names):
    raise ValueError(f"run: stage names must be distinct, got {names}")
  lines = metrics_lib.JsonLines(workdir / "metrics.jsonl" if first else None)
  result = Result({}, {}, {}, {}, {}, {})
  root = jax.random.key(seed, impl="threefry2x32")
  with _StopSignals() as stop:
    for i, stage in enumerate(stages):
      key = named_key(root, stage.name)
      runner = _Runner(stage, workdir, key, mesh, result, log)
      resumed = runner.restore(keep)
      if runner.step_number < stage.steps:
        lines.rewind(stage.name, runner.step_number, names[:i])
        if resumed:
          log(f"{stage.name}: resumed at step {runner.step_number}")
      try:
        runner.train(
          stop, lines, hooks, log_every, checkpoint_every, max_skips_in_a_row
        )
        runner.finish(result)
      except BaseException as e:
        if runner.several and isinstance(e, jax.errors.JaxRuntimeError):
          raise runner.lost(e) from e  # what waits for the lost one waits long
        runner.close_after(e)
        raise
  return result


class _Runner:
  """One stage's state while it is trained."""

  def __init__(self, stage, workdir, key, mesh, result, log):
    self.stage = stage
    self.log = log
    self.step = make_step(stage.method, stage.optimizers, mesh, **stage.options)
    params = stage.init(named_key(key, "init"), result.params)
    expected = set(stage.method.named(Frozen)) | set(stage.method.losses)
    if missing := sorted(expected - set(params)):
      raise ValueError(
        f"stage {stage.name}: init must return parameters for"
        f" {sorted(expected)}, got none for {missing}"
      )
    self.frozen = self.step.place(
      {n: params[n] for n in stage.method.named(Frozen)}
    )
    self.state = self.step.init(params, named_key(key, "steps"))
    self.data = stage.data()
    # Host devices share the cores: many steps in flight starve a collective of
    # one of them until its rendezvous times out and aborts the process.
    devices = mesh.devices.flat
    self.bounded = devices[0].platform == "cpu" and len(devices) > 1
    self.several = jax.process_count() > 1
    self.folder = workdir / "checkpoints" / stage.name
    self.clock = _Clock()
    self.step_number = 0

  def restore(self, keep: int) -> bool:
    self.checkpoints = checkpoint_lib.Checkpoints(
      self.folder, keep=keep, best=self.stage.best, log=self.log
    )
    found = self.checkpoints.restore(self.state)
    if found is None:
      return False
    self.state, host = found
    self.data.set_state(base64.b64decode(host["data"]))
    self.clock = _Clock(host["clock"])
    self.step_number = int(self.state.step)
    return True

  def save(self, measured: float | None = None) -> None:
    """Begins to write a checkpoint of now."""
    self.checkpoints.save_async(
      self.state,
      {
        "data": base64.b64encode(self.data.get_state()).decode(),
        "clock": self.clock.read(),
      },
      measured,
    )

  def measured(self, values: Mapping[str, float]) -> float | None:
    """The value that chooses the best checkpoint, where it was measured now."""
    best = self.stage.best
    if best is None or best.metric not in values:
      return None
    value = float(values[best.metric])
    value = _of_the_first(value) if self.several else value
    return value if math.isfinite(value) else None

  def improves(self, value: float | None) -> bool:
    """Whether no checkpoint of this stage is as good as this value."""
    if value is None:
      return False
    best, found = self.stage.best, self.checkpoints.best()
    of = lambda number: best.rank({best.metric: number})
    return found is None or of(value) > of(found[1])

  def train(
    self, stop, lines, hooks, log_every, checkpoint_every, max_skips
  ) -> None:
    stage, step = self.stage, self.step
    totals = metrics_lib.Totals()

    def moment(values=None):
      return hooks_lib.Moment(
        stage, self.step_number, self.state, self.frozen, values or {}
      )

    if self.step_number >= stage.steps:
      return
    for hook in hooks:
      hook.on_start(moment())
    seen, since = 0, self.clock.working()
    began, waiting = time.monotonic(), True
    try:
      while self.step_number < stage.steps:
        batch = sharding.put_rows(next(self.data), step.mesh)
        if stage.method.collect is not None:
          batch = self._collect(batch)
        seen += jax.tree.leaves(batch)[0].shape[0]
        updates = stage.method.schedule.updates(self.step_number)
        self.state, metrics = step(updates, self.state, self.frozen, batch)
        self.step_number += 1
        totals.add(metrics)
        if self.bounded or waiting:
          jax.block_until_ready(self.state.step)
        if waiting:
          waiting = False
          self.log(
            f"{stage.name}: first step after {time.monotonic() - began:.1f} s"
            f" ({self.clock.read()[2]:.1f} s compiling until now)"
          )
        last = self.step_number == stage.steps
        if self.step_number % log_every == 0 or last:
          values = totals.flush()
          now = self.clock.working()
          values["samples_per_second"] = seen / max(now - since, 1e-9)
          seen, since = 0, now
          lines.write(stage.name, self.step_number, values)
          for hook in hooks:
            hook.on_log(moment(values))
          self._guard(max_skips, updates, batch)
        found = {}
        for hook in hooks:
          if values := hook.on_step(moment()):
            lines.write(stage.name, self.step_number, values)
            found.update(values)
        self.checkpoints.check()
        value = self.measured(found)
        due = self.step_number % checkpoint_every == 0 or last
        if due or self.improves(value):
          self.save(value)
        received = stop.received
        if self.several:
          # All of them leave at the same step, whoever was told to.
          asked = self.step_number % log_every == 0 and not last
          received = _agree(received) if asked else None
        if received is not None and not last:
          self.save()
          raise Interrupted(stage.name, self.step_number, received)
    finally:
      for hook in hooks:
        hook.on_end(moment())

  def _collect(self, batch):
    key = jax.random.fold_in(self.state.key, self.state.step)
    updates = self.stage.method.schedule.updates(self.step_number)
    return self.stage.method.collect(
      {**self.frozen, **self.state.params},
      batch,
      Context(self.state.step, key, updates, self.state.carry),
    )

  def _guard(self, max_skips: int, updates, batch) -> None:
    for name, count in jax.device_get(self.state.skipped).items():
      if count[1] > max_skips:
        self.save()
        rows = None
        if name in updates:
          rows = self.step.not_finite(name, self.state, self.frozen, batch)
        where = ""
        if rows:
          more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
          where = f"; in the last batch by rows {rows[:8]}{more}"
        elif rows is not None:
          where = "; in the last batch by no single row"
        raise Diverged(
          f"stage {self.stage.name}: {count[1]} updates in a row of"
          f" {name!r} had a loss or gradient that is not finite (limit"
          f" {max_skips}){where}; the last good state is saved at step"
          f" {self.step_number} in {self.folder}"
        )

  def finish(self, result: Result) -> None:
    self.checkpoints.wait()
    name = self.stage.name
    wall, cpu, compiled = self.clock.read()
    host = {"seconds": wall, "cpu_seconds": cpu, "compile_seconds": compiled}
    for field, value in host.items():
      getattr(result, field)[name] = value
    for network, count in jax.device_get(self.state.skipped).items():
      result.skipped[f"{name}/{network}"] = int(count[0])
    result.params[name] = {**self.frozen, **self.state.params}
    if found := self.checkpoints.best():
      step, value = found
      metric = self.stage.best.metric
      result.best[name] = {"step": step, "metric": metric, "value": value}
      self.log(f"{name}: best {metric} {value:.4g}, step {step}, is kept")
    self.checkpoints.close()

  def close_after(self, error: BaseException) -> None:
    """Finishes what is being written when the stage ends by an error."""
    try:
      self.checkpoints.close()
    except checkpoint_lib.SaveError as unsaved:
      # A full disk may be met anywhere first; the others say that all is saved.
      if isinstance(error, (OSError, Interrupted, Diverged)):
        raise unsaved from error
      self.log(str(unsaved))

  def lost(self, error: BaseException) -> LostProcess:
    """What a failed exchange with the other processes means."""
    saved = self.checkpoints.steps()
    return LostProcess(
      f"stage {self.stage.name}: process {jax.process_index()} of"
      f" {jax.process_count()} lost another process at step"
      f" {self.step_number} ({str(error).splitlines()[0][:160]}); last"
      f" checkpoint: {f'step {saved[-1]}' if saved else 'none'}. The same"
      " command resumes."
    )
