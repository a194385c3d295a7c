"""One comparison, before the first step, of what must agree in a run.

A sampler at another temperature than the loss, a teacher that pads on the other
side, an EOS that another tokenizer gives: none of these raises, all of them
train something else. Each party states what it knows, and disagreement is one
line that names all of it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distilljax import _checks


class Settings(NamedTuple):
  """What one party assumes; None is "no opinion".

  Attributes:
    temperature: of the distribution it samples from or compares.
    top_p: 1 is no filter.
    top_k: 0 is no filter.
    padding_side: of the prompts, "left" or "right".
    eos_id: token that ends a completion.
    pad_id: token at padding.
    vocab_size: number of logits.
    tokenizer: a `tokenizer_fingerprint`, or any name that is equal exactly
      where the ids mean the same.
  """

  temperature: float | int | None = None
  top_p: float | int | None = None
  top_k: int | None = None
  padding_side: str | None = None
  eos_id: int | None = None
  pad_id: int | None = None
  vocab_size: int | None = None
  tokenizer: str | None = None


def tokenizer_fingerprint(vocab: Mapping[str, int] | Sequence[str]) -> str:
  """A short hash of a vocabulary: equal where every piece has the same id.

  Args:
    vocab: piece -> id, or the pieces in the order of their ids.

  Returns:
    16 hexadecimal digits.

  Example:
    >>> a, b = tokenizer_fingerprint(["x", "y"]), {"y": 1, "x": 0}
    >>> a == tokenizer_fingerprint(b)
    True
  """
  if not isinstance(vocab, Mapping):
    vocab = {piece: i for i, piece in enumerate(vocab)}
  pieces = sorted((int(i), piece) for piece, i in vocab.items())
  return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()[:16]


def check_settings(
  *,
  sampler: Settings,
  teacher: Settings | None = None,
  loss: Settings | None = None,
) -> None:
  """Raises one line that names every setting the parties disagree on.

  Two parties disagree on a field where both have an opinion and these differ.
  Logits of different width are allowed only if the loss trims both: its
  vocab_size is then the smaller of the two. Ids must lie inside the smallest
  vocabulary stated. A filter (top_p, top_k) of the sampler that the loss, which
  states the full distribution, does not have is a disagreement like any other.

  Args:
    sampler: of the rollouts.
    teacher: of the network that scores them.
    loss: what the objective assumes.

  Raises:
    ValueError: any disagreement, a padding side that is neither left nor
      right, or an EOS or padding id outside the vocabulary.

  Example:
    >>> check_settings(
    ...   sampler=Settings(temperature=1.0, eos_id=2),
    ...   loss=Settings(temperature=1.0),
    ... )
  """
  parties = {"sampler": sampler, "teacher": teacher, "loss": loss}
  parties = {k: s for k, s in parties.items() if s is not None}
  found = []
  for field in Settings._fields:
    stated = {
      who: getattr(s, field)
      for who, s in parties.items()
      if getattr(s, field) is not None
    }
    if field == "vocab_size":
      widths = [stated[w] for w in ("sampler", "teacher") if w in stated]
      trimmed = (
        len(set(widths)) == 2 and stated.get("loss", -1) == min(widths)
      )
      if trimmed:
        continue
    if len(set(stated.values())) > 1:
      listed = ", ".join(f"{who} {value!r}" for who, value in stated.items())
      found.append(f"{field} ({listed})")
    if field == "padding_side":
      found += [
        f"padding_side ({who} {value!r} is neither 'left' nor 'right')"
        for who, value in stated.items()
        if value not in ("left", "right")
      ]
  sizes = [s.vocab_size for s in parties.values() if s.vocab_size is not None]
  if sizes:
    for field in ("eos_id", "pad_id"):
      found += [
        f"{field} ({who} {getattr(s, field)} is outside [0, {min(sizes) - 1}])"
        for who, s in parties.items()
        if getattr(s, field) is not None
        and not 0 <= getattr(s, field) < min(sizes)
      ]
  if found:
    _checks.fail(
      "check_settings",
      "sampler, teacher and loss",
      "set alike",
      "; ".join(found),
    )


__all__ = ["Settings", "check_settings", "tokenizer_fingerprint"]
