"""The start-up check: every mismatch is named, in one line, and only those."""

import pytest

from distilljax import lm
from tests.helpers import one_line_error

_GOOD = lm.Settings(
    temperature=1.0,
    top_p=1,
    top_k=0,
    padding_side="left",
    eos_id=3,
    pad_id=0,
    vocab_size=8,
    tokenizer="abc",
)


def test_agreement_and_silence_pass():
  lm.check_settings(sampler=_GOOD, teacher=_GOOD, loss=_GOOD)
  lm.check_settings(sampler=_GOOD)
  lm.check_settings(sampler=_GOOD, teacher=lm.Settings(), loss=lm.Settings())
  lm.check_settings(sampler=lm.Settings(), teacher=_GOOD)
  # 1 and 1.0 are the same temperature.
  lm.check_settings(sampler=_GOOD, loss=lm.Settings(temperature=1))


@pytest.mark.parametrize("party", ["teacher", "loss"])
@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", 0.7),
        ("top_p", 0.9),
        ("top_k", 20),
        ("padding_side", "right"),
        ("eos_id", 4),
        ("pad_id", 1),
        ("vocab_size", 7),
        ("tokenizer", "abd"),
    ],
)
def test_each_field_is_compared(field, value, party):
  other = _GOOD._replace(**{field: value})
  parties = {"sampler": _GOOD, "teacher": _GOOD, "loss": _GOOD, party: other}
  with one_line_error(
      rf"^check_settings: sampler, teacher and loss must be set alike, got"
      rf" {field} \(sampler {getattr(_GOOD, field)!r}, .*{party} {value!r}"
      rf"[^;]*\)$"
  ):
    lm.check_settings(**parties)


def test_teacher_and_loss_are_compared_too():
  with one_line_error(r"got eos_id \(teacher 3, loss 4\)$"):
    lm.check_settings(
        sampler=lm.Settings(),
        teacher=lm.Settings(eos_id=3),
        loss=lm.Settings(eos_id=4),
    )


def test_all_mismatches_stand_in_one_line():
  with one_line_error(
      r"temperature \(sampler 0.7, loss 1.0\); padding_side \(sampler 'left',"
      r" teacher 'right'\); eos_id \(sampler 3, teacher 2\)$"
  ):
    lm.check_settings(
        sampler=lm.Settings(temperature=0.7, padding_side="left", eos_id=3),
        teacher=lm.Settings(padding_side="right", eos_id=2),
        loss=lm.Settings(temperature=1.0),
    )


def test_vocabularies_differ_only_if_the_loss_trims_both():
  sampler = lm.Settings(vocab_size=151936)
  teacher = lm.Settings(vocab_size=152064)
  trims = lambda n: lm.Settings(vocab_size=n)
  lm.check_settings(sampler=sampler, teacher=teacher, loss=trims(151936))
  for loss in (None, lm.Settings(), trims(152064), trims(100)):
    with one_line_error(r"vocab_size \(sampler 151936, teacher 152064"):
      lm.check_settings(sampler=sampler, teacher=teacher, loss=loss)
  with one_line_error(r"vocab_size \(sampler 8, teacher 8, loss 7\)$"):
    lm.check_settings(sampler=trims(8), teacher=trims(8), loss=trims(7))


@pytest.mark.parametrize("field", ["eos_id", "pad_id"])
def test_ids_lie_in_the_smallest_vocabulary(field):
  sampler = lm.Settings(vocab_size=9, **{field: 8})
  lm.check_settings(sampler=sampler)
  with one_line_error(rf"{field} \(sampler 8 is outside \[0, 7\]\)$"):
    lm.check_settings(
        sampler=sampler,
        teacher=lm.Settings(vocab_size=8),
        loss=lm.Settings(vocab_size=8),
    )
  with one_line_error(rf"{field} \(teacher -1 is outside \[0, 8\]\)$"):
    lm.check_settings(
        sampler=lm.Settings(vocab_size=9), teacher=lm.Settings(**{field: -1})
    )


def test_a_padding_side_is_left_or_right():
  with one_line_error(r"padding_side \(sampler 'Left' is neither"):
    lm.check_settings(sampler=lm.Settings(padding_side="Left"))


def test_fingerprints_are_of_pieces_and_ids():
  one = lm.tokenizer_fingerprint(["a", "b", "c"])
  assert len(one) == 16 and int(one, 16) >= 0
  assert one == lm.tokenizer_fingerprint({"c": 2, "a": 0, "b": 1})
  assert one != lm.tokenizer_fingerprint(["b", "a", "c"])
  assert one != lm.tokenizer_fingerprint(["a", "b"])
  assert one != lm.tokenizer_fingerprint({"a": 0, "b": 1, "c": 3})
