"""One paper, one file. `get(slug)` imports it; a new file is a new method."""

import importlib
import pkgutil
from types import ModuleType

from distilljax import _checks


def names() -> list[str]:
  """Slugs of all methods: the files of this folder."""
  return sorted(
    m.name for m in pkgutil.iter_modules(__path__) if m.name[0] != "_"
  )


def get(slug: str) -> ModuleType:
  """The module of a method: `DEFAULTS` and `make(apply_fns, **hyper)`.

  Args:
    slug: the method's name, as in `names()`.

  Returns:
    The module.

  Raises:
    ValueError: no such method (the nearest name is given).
  """
  _checks.one_of("methods.get", "slug", slug, names())
  return importlib.import_module(f"distilljax.methods.{slug}")
