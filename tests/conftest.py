"""Shared fixtures: run-time type checks, strict promotion, a compile cache."""

import gc
import os

# Before JAX starts: 8 host devices cost nothing and serve the sharding tests.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jaxtyping

_HOOK = jaxtyping.install_import_hook("distilljax", "beartype.beartype")

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "distilljax",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("distilljax")


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(request):
  """Hundreds of tiny programs, each run once: compile them without optimising.

  A module that runs long programs says `LONG_PROGRAMS = True`, and everything
  does in a session with slow tests.
  """
  name = "jax_disable_most_optimizations"
  before = jax.config.values[name]
  slow = "not slow" not in (request.config.option.markexpr or "")
  long_programs = getattr(request.module, "LONG_PROGRAMS", False)
  jax.config.update(name, not (slow or long_programs))
  yield
  jax.config.update(name, before)
  # No module needs another's programs, and a worker that keeps thousands of
  # them grows to gigabytes and walks through them at every collection.
  jax.clear_caches()
  gc.collect()
  gc.freeze()


@pytest.fixture
def x64():
  """Float64 inside the test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def strict():
  """Strict dtype promotion and no rank promotion: a loss must state both."""
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture
def key():
  return jax.random.key(0)
