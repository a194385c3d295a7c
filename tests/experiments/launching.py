"""What the tests of both launchers share."""

import signal

import jax
import pytest
from absl import flags

from distilljax import train
from experiments import entry
from tests import helpers


def one_device():
  """A mesh of one: these runs are about files, not about devices."""
  return train.make_mesh(jax.devices()[:1])


@pytest.fixture(autouse=True)
def signals():
  """A launcher installs its own handlers; put the test runner's back."""
  kept = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
  with helpers.as_user():
    yield
  for number, handler in kept.items():
    signal.signal(number, handler)


def command(launcher, capsys, *arguments):
  """Runs a launcher's main in this process: (exit code, stdout, stderr)."""
  name = launcher.__name__.rpartition(".")[2]
  rest, overrides = entry.split_overrides([name, *arguments])
  flags.FLAGS.unparse_flags()
  argv = flags.FLAGS(rest)
  before = jax.config.jax_compilation_cache_dir
  try:
    launcher.main(argv, overrides)
    code = 0
  except SystemExit as e:
    code = e.code
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
  out = capsys.readouterr()
  for flag in ("config", "workdir"):
    flags.FLAGS[flag].value = None
  return code, out.out, out.err
