"""Shared fixtures: run-time type checks, strict promotion, a compile cache."""

import gc
import os
import pathlib
import time

# Before JAX starts: 8 host devices cost nothing and serve the sharding tests.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _program_cache() -> pathlib.Path:
  """Folder of compiled programs: for both workers, children and later runs."""
  own = os.environ.get("DISTILLJAX_CACHE") or "~/.cache/distilljax"
  return pathlib.Path(own, "test_programs").expanduser()


os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_program_cache()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jaxtyping

_HOOK = jaxtyping.install_import_hook("distilljax", "beartype.beartype")

import hypothesis
import jax
import pytest

from tests import helpers

hypothesis.settings.register_profile(
    "distilljax",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("distilljax")


def _is_quick(config) -> bool:
  return "not slow" in (config.option.markexpr or "")


def pytest_configure(config):
  # A killed child may leave half a program, which is then compiled anew.
  config.addinivalue_line(
    "filterwarnings", "ignore:Error reading persistent compilation cache"
  )
  # Fusions are as right without XLA's newer emitters, and compile in half the
  # time.
  flag = " --xla_cpu_use_fusion_emitters=false"
  if _is_quick(config) and helpers.CHOOSES_EMITTERS:
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removesuffix(flag) + flag
  if hasattr(config, "workerinput"):
    return
  month_ago = time.time() - 30 * 86400
  for file in _program_cache().glob("*-cache"):
    if file.stat().st_mtime < month_ago:
      file.unlink(missing_ok=True)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(request):
  """Hundreds of tiny programs, each run once: compile them without optimising.

  A module that runs long programs says `LONG_PROGRAMS = True`, and everything
  does in a session with slow tests.
  """
  name = "jax_disable_most_optimizations"
  before = jax.config.values[name]
  long_programs = getattr(request.module, "LONG_PROGRAMS", False)
  jax.config.update(name, _is_quick(request.config) and not long_programs)
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
