"""Hundreds of tiny programs, each run once: compile them without optimising."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
  name = "jax_disable_most_optimizations"
  before = jax.config.values[name]
  jax.config.update(name, True)
  yield
  jax.config.update(name, before)
