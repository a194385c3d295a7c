"""Chunk alignment: by hand, and on tokenizers trained on the spot."""

import os
import pathlib

import numpy as np
import pytest

from distilljax.lm import alignment
from tests.helpers import one_line_error

align = alignment.align_chunks


def chunks(out):
  return out.teacher.tolist(), out.student.tolist(), out.num_chunks


def test_finest_chunks():
  out = align([b"ab", b"c", b"de"], [b"a", b"bc", b"d", b"e"])
  assert chunks(out) == ([0, 0, 1], [0, 0, 1, 1], 2)
  same = [b"a", b"bc", b"d"]
  assert chunks(align(same, same)) == ([0, 1, 2], [0, 1, 2], 3)
  assert chunks(align([], [])) == ([], [], 0)
  assert out.teacher.dtype == np.int32


def test_bytes_that_differ_are_dropped():
  out = align([b"ab", b"c"], [b"a", b"x", b"c"])
  assert chunks(out) == ([-1, 0], [-1, -1, 0], 1)
  # Text left over at the end has no counterpart.
  assert chunks(align([b"ab", b"cd"], [b"ab", b"c"])) == ([0, -1], [0, -1], 1)
  assert chunks(align([b"ab"], [b"ab", b"c"])) == ([0], [0, -1], 1)
  # Half a character (the two bytes of U+00E9) is as good as any byte.
  e = "é".encode()
  assert chunks(align([e, b"a"], [e[:1], e[1:], b"a"])) == (
    [0, 1],
    [0, 0, 1],
    2,
  )


def test_special_tokens():
  """Partners make a chunk of their own, the others are skipped."""
  out = align(
    ["<s>", b"Hi", "<end>"],
    ["<bos>", "<pad>", b"H", b"i", "</s>"],
    special_pairs={"<s>": "<bos>", "<end>": "</s>"},
  )
  assert chunks(out) == ([0, 1, 2], [0, -1, 1, 1, 2], 3)
  out = align(["<s>", b"Hi", b" you"], [b"Hi", b" yo", b"u", "</s>"])
  assert chunks(out) == ([-1, 0, 1], [0, 1, 1, -1], 2)
  # Equal names are partners when nothing is said.
  out = align([b"a", "<eos>"], [b"a", "<eos>"])
  assert chunks(out) == ([0, 1], [0, 1], 2)
  # A special token stops a chunk; text before the partner is left over.
  out = align([b"ab", "<sep>", b"c"], [b"a", "<sep>", b"c"])
  assert chunks(out) == ([-1, 0, 1], [-1, 0, 1], 2)
  out = align(["<sep>", b"c"], [b"xx", b"y", "<sep>", b"c"])
  assert chunks(out) == ([0, 1], [-1, -1, 0, 1], 2)
  out = align([b"xx", b"y", "<sep>", b"c"], ["<sep>", b"c"])
  assert chunks(out) == ([-1, -1, 0, 1], [0, 1], 2)


def test_leading_space():
  out = align([b" Hi", b" you"], [b"H", b"i", b" you"])
  assert chunks(out) == ([0, 1], [0, 0, 1], 2)
  out = align(["<s>", b"Hi"], ["<s>", b" ", b"Hi"])
  assert chunks(out) == ([0, 1], [0, 1, 1], 2)
  off = align([b" Hi"], [b"Hi"], equalize_leading_space=False)
  assert off.num_chunks == 0
  assert align([b" Hi"], [b" Hi"]).num_chunks == 1


def test_space_chunks():
  """Close only where both next tokens open a word."""
  teacher = [b" ", b"e", b"ab", b" a", b"b"]
  student = [b" e", b"a", b"b", b" a", b"b"]
  fine = align(teacher, student)
  assert chunks(fine) == ([0, 0, 1, 2, 3], [0, 1, 1, 2, 3], 4)
  words = align(teacher, student, kind="space")
  assert chunks(words) == ([0, 0, 0, 1, 1], [0, 0, 0, 1, 1], 2)
  special = align([b"a", b"b", "<s>"], [b"a", b"b", "<s>"], kind="space")
  assert chunks(special) == ([0, 0, 1], [0, 0, 1], 2)
  for space in (b"\n", b"\t", b"\r"):
    assert align([b"a", space], [b"a", space], kind="space").num_chunks == 2


def test_unbiased_chunks():
  """Close only where the pair of last tokens is unbiased enough."""
  tokens = [b"a", b"b", b"c"]
  table = {b"a": 0.2, b"b": 0.1, b"c": 0.0}
  out = align(
    tokens, tokens, kind="unbiased", bias=lambda t, s: max(table[t], table[s])
  )
  assert chunks(out) == ([0, 0, 1], [0, 0, 1], 2)
  out = align(
    tokens, tokens, kind="unbiased", bias=lambda t, s: table[t], threshold=0.05
  )
  assert out.num_chunks == 1


def test_pad():
  rows = [align([b"ab"], [b"a", b"b"]), align([b"a", b"b"], [b"a", b"b"])]
  t, s, c = alignment.pad_alignments(rows, teacher_length=3, student_length=4)
  assert c == 3
  np.testing.assert_array_equal(t, [[0, -1, -1], [0, 1, -1]])
  np.testing.assert_array_equal(s, [[0, 0, -1, -1], [0, 1, -1, -1]])
  assert t.dtype == s.dtype == np.int32
  _, _, c = alignment.pad_alignments(
    rows, teacher_length=2, student_length=2, num_chunks=2
  )
  assert c == 2
  for options, match in (
    ({"teacher_length": 1, "student_length": 4}, "teacher_length"),
    ({"teacher_length": 3, "student_length": 1}, "student_length"),
    (
      {"teacher_length": 3, "student_length": 4, "num_chunks": 1},
      "num_chunks",
    ),
  ):
    with one_line_error(match):
      alignment.pad_alignments(rows, **options)


def test_token_bytes():
  out = alignment.token_bytes(
    ["Ġa", "Ċ", "Ã©", "<s>"], kind="byte_level", special=["<s>"]
  )
  assert out == [b" a", b"\n", "é".encode(), "<s>"]
  # All 256 bytes have a character of their own.
  alphabet = alignment._byte_alphabet()
  assert sorted(alphabet.values()) == list(range(256))
  out = alignment.token_bytes(["▁a", "<0x0A>", "é"], kind="metaspace")
  assert out == [b" a", b"\n", "é".encode()]
  assert alignment.token_bytes(["é "], kind="text") == ["é ".encode()]
  with one_line_error("byte-level alphabet"):
    alignment.token_bytes(["a b"], kind="byte_level")
  with one_line_error("kind must be"):
    alignment.token_bytes(["a"], kind="bpe")


def test_word_boundaries():
  out = alignment.word_boundaries(
    [b" a", b"a", b"\n", b"\t", b"\r", b"", "<eos>", "<pad>"], end=["<eos>"]
  )
  np.testing.assert_array_equal(out, [1, 0, 1, 1, 1, 0, 1, 0])


def test_bad_input():
  with one_line_error("kind must be"):
    align([b"a"], [b"a"], kind="words")
  with one_line_error("bias must be"):
    align([b"a"], [b"a"], kind="unbiased")
  with one_line_error("student_tokens must be bytes or str, got int"):
    align([b"a"], [3])


# --- real tokenizers -----------------------------------------------------


CORPUS = ("ast.py", "bisect.py", "calendar.py", "textwrap.py", "queue.py")


@pytest.fixture(scope="module")
def tokenizers_by_name():
  """Byte-level BPE (two sizes), unigram with raw bytes, plain bytes."""
  tokenizers = pytest.importorskip("tokenizers")
  folder = pathlib.Path(os.__file__).parent
  texts = [(folder / n).read_text(encoding="utf-8") for n in CORPUS]

  def bpe(size):
    out = tokenizers.Tokenizer(tokenizers.models.BPE())
    out.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False
    )
    out.train_from_iterator(
      texts,
      tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      ),
    )
    return lambda text: alignment.token_bytes(
      out.encode(text).tokens, kind="byte_level"
    )

  def unigram():
    out = tokenizers.Tokenizer(tokenizers.models.Unigram())
    out.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    out.train_from_iterator(
      texts,
      tokenizers.trainers.UnigramTrainer(
        vocab_size=300,
        show_progress=False,
        unk_token="<unk>",
        special_tokens=["<unk>"],
      ),
    )
    return lambda text: alignment.token_bytes(
      out.encode(text).tokens, kind="metaspace", special=["<unk>"]
    )

  return {
    "bpe600": bpe(600),
    "bpe350": bpe(350),
    "unigram": unigram(),
    "bytes": lambda text: [bytes([b]) for b in text.encode()],
  }


@pytest.mark.parametrize("kind", ["unconstrained", "space"])
@pytest.mark.parametrize(
  "pair",
  [
    ("bpe600", "bytes"),
    ("bpe600", "bpe350"),
    ("bpe600", "unigram"),
    ("unigram", "bytes"),
  ],
)
def test_real_tokenizers(pair, kind, tokenizers_by_name):
  """Chunks cover the same bytes, in order, and are as fine as can be."""
  text = "def run(self, items):\n  return [x + 1 for x in items if x]  # done"
  teacher, student = (tokenizers_by_name[name](text) for name in pair)
  out = align(teacher, student, kind=kind)
  sides = ((teacher, out.teacher), (student, out.student))
  for tokens, ids in sides:
    used = ids[ids >= 0]
    np.testing.assert_array_equal(np.unique(used), np.arange(out.num_chunks))
    assert np.all(np.diff(used) >= 0)
    assert len(tokens) == len(ids)
  for c in range(out.num_chunks):
    texts = [
      b"".join(t for t, i in zip(tokens, ids) if i == c)
      for tokens, ids in sides
    ]
    # The first word may carry a space that only one tokenizer adds.
    assert texts[0] == texts[1] or (
      c == 0 and texts[0].lstrip() == texts[1].lstrip()
    )
  # Nothing is lost: both spell the text.
  assert np.all(out.teacher >= 0) and np.all(out.student >= 0)

  def ends(tokens):
    skip = tokens[0].startswith(b" ")
    return set((np.cumsum([len(t) for t in tokens]) - skip).tolist())

  if kind == "unconstrained":
    common = ends(teacher) & ends(student)
    assert out.num_chunks == len(common - {0})
  else:
    assert out.num_chunks <= align(teacher, student).num_chunks
