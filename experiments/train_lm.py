"""Trains a config of language models and writes a report: the launcher.

python -m experiments.train_lm --config=configs/opd_chain.py --workdir=/tmp/x
Overrides: --config.opd.steps=500. The same command resumes.
"""

from experiments import entry


def main(argv: list[str], overrides: list[str]) -> None:
  """Reads flags, claims the folder, runs."""
  entry.main(
    "experiments.train_lm", "experiments.language_job", argv, overrides
  )


if __name__ == "__main__":
  entry.run(main)
