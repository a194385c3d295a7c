"""The tasks against Python's own arithmetic on the decoded text."""

import json

import numpy as np
import pytest

from distilljax import data
from distilljax.data import arithmetic
from tests.helpers import one_line_error

_TASKS = {
    "addition": lambda: data.addition(),
    "addition_3_forward": lambda: data.addition(digits=3, reverse=False),
    "chain": lambda: data.chain(),
    "chain_plus": lambda: data.chain(ops=2, operators="+"),
    "chain_hints": lambda: data.chain(ops=3, hints=True),
    "sort": lambda: data.json_list(),
    "copy": lambda: data.json_list(items=2, content="copy"),
    "double": lambda: data.json_list(items=4, content="double"),
}


def _text(task, ids):
  """Every character, padding included, EOS as "$"."""
  return "".join(task.vocab[i] for i in ids)


def _solve(name, prompt):
  """The solution's text, by other means than the task's."""
  if name.startswith("addition"):
    a, b = prompt[:-1].split("+")
    total = str(int(a) + int(b)).zfill(len(a) + 1)
    return total if name.endswith("forward") else total[::-1]
  if name.startswith("chain"):
    body = prompt.split(":")[-1][:-1]
    value, out = int(body[0]), ""
    for sign, digit in zip(body[1::2], body[2::2]):
      value = {
          "+": value + int(digit),
          "-": value - int(digit),
          "*": value * int(digit),
      }[sign] % 10
      out += str(value)
    return out
  digits = [int(c) for c in prompt[:-1]]
  values = {
      "sort": sorted(digits),
      "copy": digits,
      "double": [(2 * d) % 10 for d in digits],
  }[name]
  return json.dumps(values, separators=(",", ":"))


@pytest.mark.parametrize("name", _TASKS)
def test_solutions_are_right(name):
  task = _TASKS[name]()
  for split in ("train", "test"):
    got = task.sample(200, seed=3, split=split)
    assert got.prompts.shape == (200, task.prompt_length)
    assert got.completions.shape == (200, task.completion_length)
    assert got.prompts.dtype == got.completions.dtype == np.int32
    assert got.where.all() and got.where.shape == got.completions.shape
    for prompt, completion in zip(got.prompts, got.completions):
      want = _solve(name, _text(task, prompt))
      assert _text(task, completion) == want + "$"
      assert data.decode(task, completion) == want
      np.testing.assert_array_equal(data.encode(task, want), completion[:-1])
    scores = task.score(got.prompts, got.completions)
    assert scores.reward.dtype == np.float32 and (scores.reward == 1).all()
    assert scores.parsed.all() and scores.exact.all() and scores.trace.all()
  assert task.vocab[task.eos_id] == "$" and task.vocab[task.pad_id] == "_"
  assert len(set(task.vocab)) == len(task.vocab)


@pytest.mark.parametrize("name", _TASKS)
def test_all_kinds_of_problems_come(name):
  """Every character of the prompts appears at its place, evenly."""
  task = _TASKS[name]()
  got = task.sample(2000, seed=0)
  for column in got.prompts.T:
    share = np.bincount(column, minlength=len(task.vocab)) / 2000
    kinds = (share > 0).sum()
    assert kinds in (1, 3, 10)
    # Five standard deviations of a share of 1/10 or 1/3 among 2 000.
    np.testing.assert_allclose(share[share > 0], 1 / kinds, atol=0.053)


@pytest.mark.parametrize("name", _TASKS)
def test_splits_are_disjoint_and_seeds_repeat(name):
  task = _TASKS[name]()
  train = task.sample(3000, seed=1, split="train")
  test = task.sample(1000, seed=1, split="test")
  rows = lambda e: {p.tobytes() for p in e.prompts}
  assert not rows(train) & rows(test)
  again = task.sample(3000, seed=1)
  other = task.sample(3000, seed=2)
  np.testing.assert_array_equal(again.prompts, train.prompts)
  assert (other.prompts != train.prompts).any()
  # A problem's number is its prompt's.
  assert len(rows(train)) == len(np.unique(train.numbers))
  assert train.numbers.min() >= 0 and train.numbers.max() < task.size
  assert not arithmetic.is_test(train.numbers).any()
  assert arithmetic.is_test(test.numbers).all()


def test_one_problem_in_eight_is_held_out():
  share = arithmetic.is_test(np.arange(80000)).mean()
  # Four standard deviations of a fair draw.
  assert abs(share - 1 / 8) < 4 * (1 / 8 * 7 / 8 / 80000) ** 0.5
  # Neighbours do not go together: runs as of independent draws.
  held = arithmetic.is_test(np.arange(80000))
  assert abs((held[1:] & held[:-1]).mean() - 1 / 64) < 0.002


def _score(task, prompt, *texts):
  """Scores of completions of one prompt, given as text."""
  width = max(map(len, texts))
  rows = [data.encode(task, t.ljust(width, "_")) for t in texts]
  prompts = np.stack([data.encode(task, prompt)] * len(texts))
  return task.score(prompts, np.stack(rows))


def test_addition_scores():
  task = data.addition()
  got = _score(task, "06+85=", "190$", "190$777", "091$", "190", "19$",
               "1900$", "19+$", "$")  # fmt: skip
  assert got.reward.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
  assert got.parsed.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
  assert got.exact.tolist() == got.trace.tolist() == got.reward.tolist()
  assert task.parse(data.encode(task, "190$")) == 91
  assert task.parse(data.encode(task, "190=")) is None
  forward = data.addition(reverse=False)
  assert forward.parse(data.encode(forward, "091$")) == 91
  assert _score(forward, "06+85=", "091$", "190$").reward.tolist() == [1, 0]


def test_chain_scores_tell_the_answer_from_the_trace():
  task = data.chain(ops=3)
  # 2+3=5, 5*4=0, 0-1=9 (mod 10).
  got = _score(task, "2+3*4-1=", "509$", "519$", "508$", "509", "09$", "5099$",
               "5+9$", "5099$")  # fmt: skip
  assert got.reward.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
  assert got.trace.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
  assert got.exact.tolist() == got.trace.tolist()
  assert got.parsed.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
  assert task.parse(data.encode(task, "509$")) == (5, 0, 9)
  assert task.parse(data.encode(task, "509_")) is None
  assert task.hint is None and task.hint_length == 0


def test_chain_steps_go_on_from_what_was_written():
  task = data.chain(ops=3)
  texts = {
    "509$": [1, 1, 1, 1, 0],
    "483$": [0, 0, 0, 1, 0],  # 4*4=6, 8-1=7: wrong each on its own
    "421$": [0, 0, 1, 1, 0],  # 2-1=1, from a wrong 2
    "165$": [0, 0, 1, 1, 0],
    "540$": [1, 0, 0, 1, 0],
    "50$$": [1, 1, 0, 0, 0],  # nothing behind the end is right
    "5+09": [1, 0, 0, 0, 0],  # nor behind what is no value
    "5099": [1, 1, 1, 0, 0],
  }  # fmt: skip
  rows = [np.append(data.encode(task, t), 0) for t in texts]
  prompts = np.stack([data.encode(task, "2+3*4-1=")] * len(rows))
  got = task.steps(prompts, np.stack(rows))
  assert got.dtype == np.float32 and got.tolist() == list(texts.values())
  short = task.steps(prompts, np.stack(rows)[:, :2])
  np.testing.assert_array_equal(short, got[:, :2])
  hinted = data.chain(ops=3, operators="-", hints=True)
  solved = hinted.sample(20, seed=1)
  assert hinted.steps(solved.prompts, solved.completions).all()
  assert data.addition().steps is None
  with one_line_error("chain.steps: prompts must be"):
    task.steps(prompts[:, 1:], np.stack(rows))


def test_hint_slots():
  task = data.chain(ops=3, hints=True)
  got = task.sample(4, seed=0)
  assert all(_text(task, p).startswith("___:") for p in got.prompts)
  before = got.prompts.copy()
  hinted = task.hint(got.prompts, got.completions[:, : task.hint_length])
  for p, h, c in zip(got.prompts, hinted, got.completions):
    assert _text(task, h) == data.decode(task, c) + _text(task, p)[3:]
  np.testing.assert_array_equal(got.prompts, before)  # a copy
  np.testing.assert_array_equal(task.hint(hinted, None), got.prompts)
  # Hints change no score.
  scores = task.score(hinted, got.completions)
  assert scores.trace.all()
  with one_line_error(r"hints must be \[n, h\]=\[4, 3\] like prompts"):
    task.hint(got.prompts, got.completions)


def test_json_scores():
  task = data.json_list()
  got = _score(task, "372=", "[2,3,7]$", "[2,3,8]$", "[3,7,2]$", "[2,3]$",
               "[2,3,7,7]$", "[2,3,7]", "[2,3,7,$", "[2]3,7]$", "[2,3,]]$",
               "[2,3,7]$9")  # fmt: skip
  third = np.float32(1 / 3)
  assert got.reward.tolist() == [1, 2 * third, 0, 0, 0, 0, 0, 0, 0, 1]
  assert got.parsed.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 1]
  assert got.exact.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
  assert got.trace.tolist() == got.exact.tolist()
  assert task.parse(data.encode(task, "[0,3,7]$")) == (0, 3, 7)
  assert task.structure.tolist() == [1, 0, 1, 0, 1, 0, 1, 1]


def test_json_broken_solutions_close_too_early():
  task = data.json_list(items=4)
  whole = task.sample(3000, seed=5)
  got = task.sample(3000, seed=5, broken=0.4)
  np.testing.assert_array_equal(got.prompts, whole.prompts)
  scores = task.score(got.prompts, got.completions)
  # Four standard deviations.
  assert abs(scores.parsed.mean() - 0.6) < 4 * (0.24 / 3000) ** 0.5
  kept = []
  for row, where, full in zip(got.completions, got.where, whole.completions):
    text, reference = data.decode(task, row), data.decode(task, full)
    assert text[:-1] == reference[: len(text) - 1] and text[-1] == "]"
    assert where.sum() == len(text) + 1 and where[: len(text) + 1].all()
    assert row[where][-1] == task.eos_id
    assert (row[~where] == task.pad_id).all()
    kept.append(len(json.loads(text)))
  counts = np.bincount(kept, minlength=5)[1:4]
  np.testing.assert_allclose(counts / 1200, 1 / 3, atol=0.06)
  all_broken = task.sample(200, seed=5, broken=1.0)
  assert not task.score(*all_broken[:2]).parsed.any()


def test_decode_stops_at_eos_and_skips_padding():
  task = data.addition()
  ids = data.encode(task, "_1_2$3")
  assert data.decode(task, ids) == "12"


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: data.addition(digits=0), r"digits must be in \[1, 9\], got 0"),
        (lambda: data.addition(digits=10), "digits must be in"),
        (lambda: data.chain(ops=0), r"ops must be in \[1, 9\], got 0"),
        (lambda: data.chain(ops=10), "ops must be in"),
        (lambda: data.chain(operators="+/"), "operators must be out of"),
        (lambda: data.chain(operators=""), "operators must be out of"),
        (lambda: data.json_list(items=1), r"items must be in \[2, 9\], got 1"),
        (lambda: data.json_list(items=10), "items must be in"),
        (lambda: data.json_list(content="srot"), "did you mean 'sort'"),
        (
            lambda: data.json_list().sample(2, seed=0, broken=1.5),
            r"broken must be in \[0, 1\]",
        ),
        (lambda: data.chain().sample(0, seed=0), "n must be >= 1, got 0"),
        (
            lambda: data.addition().sample(1, seed=0, split="valid"),
            "split must be one of 'train', 'test'",
        ),
        (
            lambda: data.encode(data.addition(), "1?"),
            "text must be of the characters .*, got '\\?'",
        ),
        (
            lambda: data.chain().score(np.zeros((2, 3), int), np.zeros((2, 3))),
            "completions must be an integer array",
        ),
        (
            lambda: data.chain().score(
                np.zeros((2, 3), int), np.zeros((2, 3), int)
            ),
            r"prompts must be \[n, 10\], got \[2, 3\]",
        ),
        (
            lambda: data.json_list().score(
                np.zeros((2, 4), int), np.zeros((3, 3), int)
            ),
            r"completions must be \[2, t\], got \[3, 3\]",
        ),
        (
            lambda: data.addition().score(np.zeros(6, int), np.zeros((1, 3))),
            r"prompts must be \[n, p\]",
        ),
    ],
)
def test_bad_input(call, match):
  with one_line_error(match):
    call()
