"""What several test files need."""

import contextlib

import jax
import jaxtyping
import pytest

# Whether this XLA has the flag that chooses the emitters of fusions on a CPU; a
# flag that it does not know would end the process.
CHOOSES_EMITTERS = jax.version.__version_info__ < (0, 11)


@contextlib.contextmanager
def as_user():
  """Switches the run-time type checks of the tests off, as for a user.

  Bad input must meet the library's own one-line error, which under the import
  hook would be hidden behind jaxtyping's.
  """
  before = jaxtyping.config.jaxtyping_disable
  jaxtyping.config.update("jaxtyping_disable", True)
  try:
    yield
  finally:
    jaxtyping.config.update("jaxtyping_disable", before)


@contextlib.contextmanager
def one_line_error(match: str, kind=(ValueError, TypeError)):
  """The block raises `kind` with a one-line message that matches `match`."""
  with as_user(), pytest.raises(kind, match=match) as info:
    yield
  assert "\n" not in str(info.value), str(info.value)


def exact_jit(fn, **options):
  """`jax.jit` by the emitters that users have and quick tests do without.

  Under them programs that differ only in terms that are zero round alike, so
  that their numbers can be compared bit for bit.
  """
  emitters = {"xla_cpu_use_fusion_emitters": True} if CHOOSES_EMITTERS else None
  return jax.jit(fn, compiler_options=emitters, **options)
