"""What `import distilljax` costs beside `import jax`: at most 15 % more.

python -m benchmarks.import_time [--rounds=15]

The two are timed in fresh processes that take turns, so that whatever else the
machine does meets both alike; CPU seconds of the import alone, medians, and the
ratio of each round. Exit status 1 above the limit.
"""

import argparse
import statistics
import subprocess
import sys

LIMIT = 1.15
CODE = """
import time
began = time.process_time()
import {name}
print(time.process_time() - began)
"""


def seconds(name):
  """CPU seconds that importing a package takes in a process of its own."""
  done = subprocess.run(
      [sys.executable, "-c", CODE.format(name=name)],
      capture_output=True, text=True, check=True,
  )
  return float(done.stdout)


def main():
  """Prints the medians and the ratio."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=15)
  rounds = parser.parse_args().rounds
  for name in ("jax", "distilljax"):  # files into the page cache, bytecode
    seconds(name)
  times = {"jax": [], "distilljax": []}
  for i in range(rounds):
    order = ("jax", "distilljax") if i % 2 else ("distilljax", "jax")
    for name in order:
      times[name].append(seconds(name))
  ratios = sorted(b / a for a, b in zip(times["jax"], times["distilljax"]))
  for name, values in times.items():
    print(f"import {name}: median {statistics.median(values):.3f} CPU s")
  ratio = statistics.median(ratios)
  print(
      f"ratio: median {ratio:.3f} of {rounds} rounds (from {ratios[0]:.3f} to"
      f" {ratios[-1]:.3f}); limit {LIMIT}"
  )
  return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
  sys.exit(main())
