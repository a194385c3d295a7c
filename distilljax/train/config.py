"""Configs: plain values, one string argument, one-line errors."""

import importlib.util
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import ml_collections

from distilljax import _checks

Config: TypeAlias = Mapping[str, Any] | ml_collections.ConfigDict


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
  """Parses a config's string argument: `runlocal,steps=200`.

  Args:
    arg: comma-separated `name` (a flag, True) or `name=value`, or None.
    **defaults: the names that may be given and their values; a value is read in
      the type of its default (None: as a string).

  Returns:
    A ConfigDict of the defaults with the given values in place.

  Raises:
    ValueError: an unknown name (the nearest is named) or an unreadable value.
  """
  out = dict(defaults)
  for item in filter(None, (arg or "").split(",")):
    name, equals, text = item.partition("=")
    if name not in defaults:
      raise ValueError(
        f"config argument: {name!r} must be one of {sorted(defaults)}"
        f"{_checks.nearest(name, defaults)}"
      )
    out[name] = _read(name, text, defaults[name]) if equals else True
  return ml_collections.ConfigDict(out)


def _read(name: str, text: str, default: Any) -> Any:
  if default is None or isinstance(default, str):
    return text
  if isinstance(default, bool):
    if text.lower() in ("true", "1", "false", "0"):
      return text.lower() in ("true", "1")
    raise ValueError(
      f"config argument: {name} must be true or false, got {text!r}"
    )
  try:
    return type(default)(text)
  except ValueError:
    raise ValueError(
      f"config argument: {name} must be a {type(default).__name__}, got"
      f" {text!r}"
    ) from None


def _value(text: str, default: Any) -> Any:
  """Reads an override in the type of the value it replaces."""
  if isinstance(default, (tuple, list)):
    import ast  # pylint: disable=g-import-not-at-top

    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      raise ValueError(f"must be a tuple, got {text!r}") from None
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
  if isinstance(default, bool):
    if text.lower() not in ("true", "1", "false", "0"):
      raise ValueError(f"must be true or false, got {text!r}")
    return text.lower() in ("true", "1")
  if default is None:
    try:
      return json.loads(text)
    except json.JSONDecodeError:
      return text
  try:
    return type(default)(text)
  except ValueError:
    raise ValueError(
      f"must be a {type(default).__name__}, got {text!r}"
    ) from None


def load(path: str, overrides: Iterable[str] = ()) -> ml_collections.ConfigDict:
  """Reads `<file>.py[:argument]` and applies `dotted.key=value` overrides.

  Args:
    path: file with `get_config(arg=None)`, and its argument after a colon.
    overrides: such as "student.learning_rate=1e-3".

  Returns:
    The locked config.

  Raises:
    ValueError: no such file, unknown key (the nearest is named), a value that
      cannot be read; always one line.
  """
  file, _, arg = path.partition(":")
  if not os.path.isfile(file):
    folder = pathlib.Path(file).parent
    there = [str(p) for p in folder.glob("*.py") if p.stem != "__init__"]
    raise ValueError(
      f"config: no such file {file!r}{_checks.nearest(file, there)}"
    )
  spec = importlib.util.spec_from_file_location("distilljax_config", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(arg or None)
  for item in overrides:
    name, equals, text = item.partition("=")
    if not equals:
      raise ValueError(f"override: {item!r} must read key=value")
    flat = flatten(config)
    if name not in flat:
      raise ValueError(
        f"override: unknown key {name!r}{_checks.nearest(name, flat)}"
      )
    try:
      value = _value(text, flat[name])
    except ValueError as e:
      raise ValueError(f"override: {name} {e}") from None
    block, parts = config, name.split(".")
    for part in parts[:-1]:
      block = block[part]
    block[parts[-1]] = value
  return config.lock()


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
  """{"student.learning_rate": 1e-3, ...} of a nested config."""
  out = {}
  for key in config:
    value, name = config[key], f"{prefix}{key}"
    if isinstance(value, (Mapping, ml_collections.ConfigDict)):
      out.update(flatten(value, f"{name}."))
    else:
      out[name] = value
  return out


def to_json(config: Config) -> str:
  """The config as JSON text with sorted keys."""
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  return json.dumps(config, indent=2, sort_keys=True) + "\n"


def known(block: str, given: Config, allowed: Iterable[str]) -> None:
  """Raises one line for a key of a config block that nothing reads."""
  allowed = list(allowed)
  prefix = f"{block}." if block else ""
  for name in given:
    if name not in allowed:
      raise ValueError(
        f"config: unknown key {prefix}{name}{_checks.nearest(name, allowed)}"
      )


def claim_workdir(workdir: str | os.PathLike, config: Config) -> bool:
  """Takes a folder for the run of one config; refuses another config's.

  Args:
    workdir: folder, created where missing.
    config: the resolved config; written to `config.json`.

  Returns:
    True where this config has run here before (the run resumes).

  Raises:
    ValueError: the folder cannot be written, or holds another config's run
      (the fields that differ are listed).
  """
  workdir = pathlib.Path(workdir)
  path = workdir / "config.json"
  text = to_json(config)
  if path.exists():
    try:
      mine, theirs = (
        flatten(json.loads(text)),
        flatten(json.loads(path.read_text())),
      )
    except json.JSONDecodeError:
      raise ValueError(
        f"workdir: {path} cannot be read; use another --workdir"
      ) from None
    if mine != theirs:
      missing = "(absent)"
      fields = [
        f"{k}: {theirs.get(k, missing)} there, {mine.get(k, missing)} now"
        for k in sorted({**mine, **theirs})
        if mine.get(k, missing) != theirs.get(k, missing)
      ]
      raise ValueError(
        f"workdir: {workdir} holds a run of another config"
        f" ({'; '.join(fields)}); use another --workdir"
      )
    return True
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
  except OSError as e:
    raise ValueError(
      f"workdir: {workdir} cannot be written ({e.strerror}); choose another"
      " --workdir"
    ) from None
  return False
