"""Trains a config and writes a report: the launcher.

python -m experiments.train --config=configs/dmd2_fashion14.py --workdir=/tmp/x
Overrides: --config.student.steps=500. The same command resumes.
"""

from experiments import entry


def main(argv: list[str], overrides: list[str]) -> None:
  """Reads flags, claims the folder, runs."""
  entry.main("experiments.train", "experiments.job", argv, overrides)


if __name__ == "__main__":
  entry.run(main)
