"""What every launcher does around its job: flags, signals, one-line errors."""

import contextlib
import importlib
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Mapping

from absl import app, flags, logging

_CONFIG = flags.DEFINE_string(
  "config", None, "config file, with its argument: configs/x.py:runlocal"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
_DEBUG = flags.DEFINE_bool("debug", False, "check values: NaN, ranges, ids")
_DISTRIBUTED = flags.DEFINE_enum(
  "distributed",
  "auto",
  ["auto", "on", "off"],
  "several processes, one run: auto looks for a cluster's environment",
)
_CACHE = flags.DEFINE_string(
  "compile_cache",
  None,
  "folder of compiled programs; default: the user's cache folder; 'off'",
)


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
  """Takes `--config.key=value` out of the arguments.

  Args:
    argv: the command line.

  Returns:
    (the other arguments, the overrides as `key=value`).
  """
  prefix = "--config."
  overrides = [a[len(prefix) :] for a in argv if a.startswith(prefix)]
  return [a for a in argv if not a.startswith(prefix)], overrides


def config_flag() -> str | None:
  """What `--config` says."""
  return _CONFIG.value


def stop(message: str, code: int) -> None:
  """Ends the process with one line.

  Args:
    message: the line.
    code: exit status.
  """
  print(message, file=sys.stderr, flush=True)
  sys.stdout.flush()
  sys.exit(code)


# Variables that say that a scheduler has started several processes.
_SIZES = ("JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_OTHERS = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")
# A process that does not answer for so long is taken for dead.
HEARTBEAT_SECONDS = 30


def in_cluster(environment: Mapping[str, str]) -> bool:
  """Whether a scheduler's environment speaks of several processes.

  Args:
    environment: such as `os.environ`.
  """
  if any(environment.get(name) for name in _OTHERS):
    return True
  if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
    return True
  # An interactive allocation has tasks but no step that started this process.
  if "SLURM_NTASKS" in environment and "SLURM_STEP_ID" not in environment:
    environment = {k: v for k, v in environment.items() if k != "SLURM_NTASKS"}
  sizes = [environment.get(name, "1") for name in _SIZES]
  return any(size.isdigit() and int(size) > 1 for size in sizes)


def join(mode: str) -> None:
  """Joins the run's processes, before any device is looked at.

  `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are used
  where they are set; else JAX finds out from the scheduler.

  Args:
    mode: "auto", "on" or "off".

  Raises:
    ValueError: "on", or a cluster was found, but joining it failed.
  """
  if mode == "off" or (mode == "auto" and not in_cluster(os.environ)):
    return
  import jax

  number = lambda name: int(os.environ[name]) if name in os.environ else None
  try:
    jax.distributed.initialize(
      coordinator_address=os.environ.get("JAX_COORDINATOR_ADDRESS"),
      num_processes=number("JAX_NUM_PROCESSES"),
      process_id=number("JAX_PROCESS_ID"),
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
  except (ValueError, RuntimeError) as e:
    raise ValueError(
      f"--distributed={mode}: joining the other processes failed"
      f" ({str(e).splitlines()[0]}); set JAX_COORDINATOR_ADDRESS,"
      " JAX_NUM_PROCESSES and JAX_PROCESS_ID, or pass --distributed=off"
    ) from None


def _compile_cache() -> None:
  import jax

  from distilljax import evals

  folder = _CACHE.value or str(evals.cache_folder() / "xla")
  if folder == "off":
    return
  try:
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  except OSError as e:
    print(f"compile cache: {folder} cannot be used ({e.strerror})", flush=True)
    return
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  print(f"compile cache: {folder}", flush=True)


def main(
  launcher: str, job: str, argv: list[str], overrides: list[str]
) -> None:
  """Reads flags, claims the folder, runs `train_and_evaluate` of a job.

  Args:
    launcher: module that the user called, for the command in the report.
    job: module with `train_and_evaluate(config, workdir, *, command)`.
    argv: arguments that are no flags, the program first.
    overrides: what `split_overrides` found.
  """
  logging.set_verbosity(logging.WARNING)
  if len(argv) > 1:
    stop(f"unknown argument {argv[1]!r}; flags begin with --", 2)
  if not _CONFIG.value or not _WORKDIR.value:
    stop("give --config=configs/<name>.py and --workdir=<folder>", 2)

  def interrupted(number, frame):
    del frame
    name = signal.Signals(number).name
    print(
      f"stopped by {name}; nothing is lost, the same command resumes.",
      file=sys.stderr,
      flush=True,
    )
    os._exit(0 if number == signal.SIGTERM else 130)

  # The training loop replaces these while it runs.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, interrupted)

  from distilljax import data, train
  from distilljax.train import config as config_lib

  work = importlib.import_module(job)
  try:
    config = config_lib.load(_CONFIG.value, overrides)
    join(_DISTRIBUTED.value)
    _compile_cache()
    command = " ".join(
      [f"python -m {launcher}", f"--config={_CONFIG.value}"]
      + [f"--config.{o}" for o in overrides]
      + [f"--workdir={_WORKDIR.value}"]
    )
    with contextlib.ExitStack() as stack:
      if _DEBUG.value:
        import jax

        import distilljax

        jax.config.update("jax_debug_nans", True)
        stack.enter_context(distilljax.debug())
      work.train_and_evaluate(config, _WORKDIR.value, command=command)
  except (train.LostProcess, data.StalledSource) as e:
    # No clean-up that would wait for the lost one, or for a stuck reader.
    print(f"error: {e}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
  except train.Interrupted as e:
    stop(str(e), 0 if e.signum == signal.SIGTERM else 130)
  except (train.SaveError, train.Diverged, ValueError, OSError) as e:
    if "\n" in str(e):
      raise
    stop(f"error: {e}", 1)


def run(run_main: Callable[[list[str], list[str]], None]) -> None:
  """Starts a launcher's `main(argv, overrides)` from the command line.

  Args:
    run_main: the launcher's main.
  """
  arguments, overrides = split_overrides(sys.argv)
  app.run(lambda argv: run_main(argv, overrides), argv=arguments)
