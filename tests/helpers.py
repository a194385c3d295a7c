"""What several test files need."""

import contextlib

import jaxtyping
import pytest


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
