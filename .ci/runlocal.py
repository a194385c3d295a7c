"""Runs the small version of the configs, as many as fit into a budget.

python .ci/runlocal.py [--budget=480] [config ...]

Every config is run as a user would, by the command of its docstring with
`:runlocal`, in a folder of its own that is then read. The order starts at a
config that the commit picks, so that where not all fit, every config has its
turn. What ran and what did not is printed by name. Exit status 1 if a run
failed or none was made.
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
# A run that takes longer than this is broken, whatever the budget.
LIMIT = 240


def configs():
  """Names of all configs, sorted."""
  return sorted(
      p.stem
      for p in (ROOT / "configs").glob("*.py")
      if p.stem not in ("__init__", "base")
  )


def launcher(name):
  """The module that a config's docstring says to run it with."""
  text = (ROOT / "configs" / f"{name}.py").read_text()
  wanted = rf"python -m (experiments\.\w+) --config=configs/{name}\.py"
  return re.search(wanted, re.sub(r"\\+\n\s*", "", text)).group(1)


def rotated(names, word):
  """The names in a cycle that begins where the word's hash points."""
  if not names:
    return []
  first = int(hashlib.sha256(word.encode()).hexdigest(), 16) % len(names)
  return names[first:] + names[:first]


def commit():
  """The commit that is checked out; a constant where there is no git."""
  done = subprocess.run(
      ["git", "rev-parse", "HEAD"],
      cwd=ROOT, capture_output=True, text=True, check=False,
  )
  return done.stdout.strip() or "no commit"


def complaint(workdir):
  """What is wrong with the files of a finished run, or None."""
  try:
    summary = json.loads((workdir / "summary.json").read_text())
  except (OSError, ValueError) as e:
    return f"summary.json: {e}"
  scores = summary.get("scores", [])
  if not scores:
    return "summary.json: no scores"
  for row in scores:
    if not math.isfinite(row["value"]):
      return f"summary.json: {row} is not finite"
  for name in ("report.html", "config.json", "metrics.jsonl"):
    if not (workdir / name).is_file() or not (workdir / name).stat().st_size:
      return f"{name} is missing or empty"
  return None


def run(name, folder, limit):
  """Runs one config; returns a complaint or None."""
  workdir = folder / name
  command = [
      sys.executable, "-m", launcher(name),
      f"--config=configs/{name}.py:runlocal", f"--workdir={workdir}",
      f"--compile_cache={folder / 'xla'}",
  ]
  log = folder / f"{name}.log"
  with log.open("w") as out:
    try:
      code = subprocess.run(
          command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out,
          stderr=subprocess.STDOUT, timeout=limit, check=False,
      ).returncode
    except subprocess.TimeoutExpired:
      code = f"none within {limit:.0f} s"
  wrong = complaint(workdir) if code == 0 else f"exit status {code}"
  if wrong:
    print(log.read_text()[-4000:])
  return wrong


def main():
  """Runs what fits, says what ran."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
      "--budget", type=float, default=math.inf,
      help="seconds after which no further run is begun",
  )
  parser.add_argument("configs", nargs="*", help="names; default: all")
  options = parser.parse_args()
  if unknown := sorted(set(options.configs) - set(configs())):
    parser.error(f"no such config: {unknown}; there are {configs()}")
  word = commit()
  names = options.configs or rotated(configs(), word)
  began = time.monotonic()
  done, failed, longest = [], [], 0.0
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    os.environ.setdefault("DISTILLJAX_CACHE", str(folder / "cache"))
    for name in names:
      spent = time.monotonic() - began
      # The first is always run; a later one only if the longest so far fits.
      if done and spent + longest > options.budget:
        break
      wrong = run(name, folder, LIMIT)
      took = time.monotonic() - began - spent
      longest = max(longest, took)
      done.append(name)
      print(f"{name}:runlocal {wrong or 'ok'}, {took:.0f} s", flush=True)
      if wrong:
        failed.append(name)
  left = [name for name in names if name not in done]
  print(
      f"configs run at {word[:12]}: {', '.join(done) or 'none'}; left for other"
      f" commits: {', '.join(left) or 'none'}"
  )
  if failed or not done:
    print(f"configs that failed: {', '.join(failed) or 'none to run'}")
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
