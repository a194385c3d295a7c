"""distilljax: losses, train steps and kernels for distillation in JAX.

Sub-packages are loaded at first use, so `import distilljax` costs little more
than `import jax` and never starts a backend.
"""

import importlib

from distilljax._checks import debug

__version__ = "0.1.0"

_SUBPACKAGES = (
    "data",
    "evals",
    "kernels",
    "lm",
    "losses",
    "methods",
    "models",
    "oracles",
    "plan",
    "processes",
    "train",
)

__all__ = ["__version__", "debug", *_SUBPACKAGES]


def __getattr__(name: str):
  if name in _SUBPACKAGES:
    return importlib.import_module(f"distilljax.{name}")
  raise AttributeError(f"module 'distilljax' has no attribute {name!r}")


def __dir__():
  return sorted(__all__)
