"""Chunk alignment of two tokenizations of one text, on the host in NumPy.

A chunk is the smallest group of consecutive tokens that covers the same bytes
on both sides. Bytes are compared, never decoded strings: a token may end in the
middle of a UTF-8 character. What comes out is a chunk number per token (-1 for
none), which is all that `losses.chunk_log_probs` needs.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from distilljax import _checks

Token = bytes | str
_SPACES = b" \t\n\r"
_META = "\u2581"  # the block that stands for a space in unigram vocabularies
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def _byte_alphabet() -> dict[str, int]:
  """Printable character -> byte, of byte-level BPE vocabularies.

  Printable Latin-1 characters stand for themselves; the other bytes, in order,
  for the characters from U+0100 on.
  """
  own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  table = {chr(b): b for b in own}
  others = [b for b in range(256) if b not in set(own)]
  table |= {chr(0x100 + i): b for i, b in enumerate(others)}
  return table


def token_bytes(
  pieces: Sequence[str],
  *,
  kind: Literal["byte_level", "metaspace", "text"],
  special: Sequence[str] = (),
) -> list[Token]:
  """The bytes that each vocabulary piece of a tokenizer stands for.

  Args:
    pieces: as the tokenizer names them (`Encoding.tokens`).
    kind: "byte_level" (GPT-2's printable alphabet), "metaspace" (unigram and
      BPE with U+2581 for a space and `<0x0A>` for a raw byte) or "text" (pieces
      are plain text, characters or words).
    special: pieces that are not text (`<s>`, `<eos>`): they stay `str`.

  Returns:
    One `bytes` a piece, or the piece itself, a `str`, where it is special.

  Raises:
    ValueError: an unknown kind, or a character outside the byte alphabet.

  Example:
    >>> token_bytes(["\u0120a", "<eos>"], kind="byte_level", special=["<eos>"])
    [b' a', '<eos>']
  """
  _checks.one_of(
    "token_bytes", "kind", kind, ("byte_level", "metaspace", "text")
  )
  special = set(special)
  return [p if p in special else _bytes_of(p, kind) for p in pieces]


def _bytes_of(piece: str, kind: str) -> bytes:
  if kind == "text":
    return piece.encode()
  if kind == "metaspace":
    if found := _BYTE.fullmatch(piece):
      return bytes([int(found.group(1), 16)])
    return piece.replace(_META, " ").encode()
  table = _byte_alphabet()
  try:
    return bytes(table[c] for c in piece)
  except KeyError as error:
    raise ValueError(
      "token_bytes: pieces must be of the byte-level alphabet, got"
      f" {piece!r}: is it a special token, or another kind?"
    ) from error


class ChunkAlignment(NamedTuple):
  """Chunk of each token, -1 for none; chunks are numbered from 0, in order."""

  teacher: np.ndarray  # [lt] int32
  student: np.ndarray  # [ls] int32
  num_chunks: int


def _is_word_start(tokens: Sequence[Token], i: int) -> bool:
  """The token after a boundary: the end, a special token, or a space first."""
  if i >= len(tokens) or isinstance(tokens[i], str):
    return True
  return tokens[i][:1] in (b" ", b"\t", b"\n", b"\r")


def _equalized(
  teacher: Sequence[Token], student: Sequence[Token]
) -> tuple[list[Token], list[Token]]:
  """Drops a leading space that only one side puts before the first word."""
  sides = [list(teacher), list(student)]
  first = [
    next((i for i, t in enumerate(s) if isinstance(t, bytes) and t), None)
    for s in sides
  ]
  if None in first:
    return sides[0], sides[1]
  starts = [s[i][:1] == b" " for s, i in zip(sides, first)]
  if starts[0] != starts[1]:
    side = 0 if starts[0] else 1
    sides[side][first[side]] = sides[side][first[side]][1:]
  return sides[0], sides[1]


def align_chunks(
  teacher_tokens: Sequence[Token],
  student_tokens: Sequence[Token],
  *,
  special_pairs: Mapping[str, str] | None = None,
  kind: Literal["unconstrained", "space", "unbiased"] = "unconstrained",
  bias: Callable[[Token, Token], float] | None = None,
  threshold: float | int = 0.1,
  equalize_leading_space: bool = True,
) -> ChunkAlignment:
  """Finds the chunks of two tokenizations of the same text.

  The side that has consumed fewer bytes advances; where both have consumed the
  same number, and `kind` allows it, a chunk closes. A chunk whose bytes differ
  on the two sides (different normalisation) is dropped: its tokens get -1. A
  special token (a `str`) forms a chunk with its partner, one without partner is
  skipped; neither is ever inside a chunk of text.

  Args:
    teacher_tokens: `bytes`, or `str` for special tokens (`token_bytes`).
    student_tokens: likewise.
    special_pairs: teacher's special token -> the student's. None pairs equal
      names.
    kind: "unconstrained" closes wherever it can (finest chunks); "space" only
      where both next tokens open a word, are special, or the text ends;
      "unbiased" only where bias(teacher's last token, student's last token) is
      at most the threshold.
    bias: for kind="unbiased": tokenization bias of a pair of last tokens.
    threshold: for kind="unbiased".
    equalize_leading_space: ignores a space before the first word that only one
      tokenizer adds.

  Returns:
    `ChunkAlignment`; equal tokenizations give one chunk a token.

  Raises:
    ValueError: an unknown kind, or kind="unbiased" without bias.

  Example:
    >>> align_chunks([b"ab", b"c"], [b"a", b"b", b"c"]).student.tolist()
    [0, 0, 1]

  References:
    arXiv:2503.20083; the skipping of unmatched specials as in the card.
  """
  fn = "align_chunks"
  _checks.one_of(fn, "kind", kind, ("unconstrained", "space", "unbiased"))
  if kind == "unbiased" and bias is None:
    _checks.fail(fn, "bias", "a function for kind='unbiased'", None)
  for name, tokens in (
    ("teacher_tokens", teacher_tokens),
    ("student_tokens", student_tokens),
  ):
    for token in tokens:
      if not isinstance(token, (bytes, str)):
        _checks.fail(fn, name, "bytes or str", type(token).__name__)
  if equalize_leading_space:
    teacher_tokens, student_tokens = _equalized(teacher_tokens, student_tokens)
  partner = (
    (lambda s: s) if special_pairs is None else (lambda s: special_pairs.get(s))
  )
  sides = (teacher_tokens, student_tokens)
  out = [np.full(len(s), -1, np.int32) for s in sides]
  at = [0, 0]
  chunk = 0

  def is_text(side):
    return at[side] < len(sides[side]) and isinstance(
      sides[side][at[side]], bytes
    )

  def may_close():
    if kind == "space":
      return all(_is_word_start(s, i) for s, i in zip(sides, at))
    if kind == "unbiased":
      return bias(sides[0][at[0] - 1], sides[1][at[1] - 1]) <= threshold
    return True

  while at[0] < len(sides[0]) or at[1] < len(sides[1]):
    if not (is_text(0) and is_text(1)):
      chunk = _align_specials(sides, at, out, chunk, partner)
      continue
    start = list(at)
    taken = [b"", b""]
    closed = False
    while not closed:
      if len(taken[0]) == len(taken[1]) and taken[0] and may_close():
        closed = True
        break
      side = 0 if len(taken[0]) <= len(taken[1]) else 1
      if not is_text(side):
        # The other side may still move where both are even but not allowed to
        # close; a side that is behind and out of text ends the chunk.
        side = 1 - side
        if len(taken[0]) != len(taken[1]) or not is_text(side):
          break
      taken[side] += sides[side][at[side]]
      at[side] += 1
    if closed and taken[0] == taken[1]:
      for side in (0, 1):
        out[side][start[side] : at[side]] = chunk
      chunk += 1
  return ChunkAlignment(out[0], out[1], chunk)


def _align_specials(sides, at, out, chunk, partner) -> int:
  """One step where at least one side is at a special token or at its end."""
  heads = [s[i] if i < len(s) else None for s, i in zip(sides, at)]
  wanted = [None, None]  # what each side's special waits for on the other
  if isinstance(heads[0], str):
    wanted[0] = partner(heads[0])
  if isinstance(heads[1], str):
    back = [t for t in sides[0] if isinstance(t, str)]
    wanted[1] = next((t for t in back if partner(t) == heads[1]), None)
  if wanted[0] is not None and wanted[0] == heads[1]:
    out[0][at[0]] = out[1][at[1]] = chunk
    at[0] += 1
    at[1] += 1
    return chunk + 1
  for side in (0, 1):
    # A special whose partner is not ahead is skipped.
    if isinstance(heads[side], str) and (
      wanted[side] is None
      or wanted[side] not in sides[1 - side][at[1 - side] :]
    ):
      at[side] += 1
      return chunk
  # The rest waits for its partner (or there is no more text): what stands in
  # the way on the other side has no counterpart.
  side = 1 if isinstance(heads[0], str) or heads[0] is None else 0
  at[side] += 1
  return chunk


def pad_alignments(
  alignments: Sequence[ChunkAlignment],
  *,
  teacher_length: int,
  student_length: int,
  num_chunks: int | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
  """Stacks the alignments of a batch, padded with -1.

  Args:
    alignments: one per row.
    teacher_length: lt of the padded batch.
    student_length: ls of the padded batch.
    num_chunks: c, static for `chunk_log_probs`; None is min(lt, ls), which
      always suffices.

  Returns:
    (teacher chunk ids [b, lt], student chunk ids [b, ls], c), int32.

  Raises:
    ValueError: a row that is longer than the padded length, or has more chunks.
  """
  fn = "pad_alignments"
  c = min(teacher_length, student_length) if num_chunks is None else num_chunks
  shape = (len(alignments),)
  teacher = np.full(shape + (teacher_length,), -1, np.int32)
  student = np.full(shape + (student_length,), -1, np.int32)
  for row, one in enumerate(alignments):
    for name, ids, length in (
      ("teacher_length", one.teacher, teacher_length),
      ("student_length", one.student, student_length),
    ):
      if len(ids) > length:
        _checks.fail(
          fn, name, f">= {len(ids)}, the length of row {row}", length
        )
    if one.num_chunks > c:
      _checks.fail(fn, "num_chunks", f">= {one.num_chunks}, of row {row}", c)
    teacher[row, : len(one.teacher)] = one.teacher
    student[row, : len(one.student)] = one.student
  return teacher, student, c


def word_boundaries(
  tokens: Sequence[Any], *, end: Sequence[str] = ()
) -> np.ndarray:
  """Which vocabulary entries open a word: the mask of `boundary_log_probs`.

  Args:
    tokens: a vocabulary as `token_bytes` gives it.
    end: special tokens that end a text and so close a word too.

  Returns:
    bool [v]: a leading space, tab or newline, or a token of `end`.
  """
  return np.array(
    [
      t in set(end) if isinstance(t, str) else bool(t) and t[0] in _SPACES
      for t in tokens
    ]
  )


__all__ = [
  "ChunkAlignment",
  "align_chunks",
  "pad_alignments",
  "token_bytes",
  "word_boundaries",
]
