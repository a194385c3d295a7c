"""Text tasks whose answers can be checked: sums, chains of sums, JSON lines.

A `Task` is all that a launcher needs: a vocabulary, examples from a seed, and a
score of completions. Prompts and completions are token ids in NumPy arrays of
fixed length; every task's prompts have one length, so nothing is padded on the
left. The prompts of "train" and "test" are disjoint whatever the seeds are: a
problem's number, not the draw, says to which split it belongs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from distilljax import _checks

Split = Literal["train", "test"]
_SPLITS = ("train", "test")
_TEST_SHARE = 8  # one problem in so many is held out
PAD, EOS = "_", "$"


class Examples(NamedTuple):
  """Problems with their reference solutions.

  Attributes:
    prompts: int32 [n, p].
    completions: the solution with EOS, padded on the right. int32 [n, c].
    where: tokens of the solution, EOS counted. bool [n, c].
    numbers: which problem of the task this is; unique. int64 [n].
  """

  prompts: np.ndarray
  completions: np.ndarray
  where: np.ndarray
  numbers: np.ndarray


class Scores(NamedTuple):
  """What completions are worth, one entry a row.

  Attributes:
    reward: 1 where the final answer is right and could be parsed, else 0; for
      `json_list` the share of the right values. float32 [n].
    parsed: the completion keeps the format and ends with EOS. bool [n].
    exact: it equals the reference solution. bool [n].
    trace: every step before the answer is right, and the answer. For tasks
      without steps the same as `exact`. bool [n].
  """

  reward: np.ndarray
  parsed: np.ndarray
  exact: np.ndarray
  trace: np.ndarray


class Task(NamedTuple):
  """A task with a verifiable reward.

  Attributes:
    name: what it is called.
    vocab: text of each token id, one character each.
    pad_id: id of the padding.
    eos_id: id of the end.
    prompt_length: p.
    completion_length: c, of the longest solution, EOS counted.
    size: number of problems, both splits together.
    sample: sample(n, *, seed, split) -> Examples, drawn with replacement.
    score: score(prompts [n, p], completions [n, t]) -> Scores; t may be any
      length, what follows EOS does not count.
    parse: parse(completion: ids up to EOS, EOS included) -> the parsed answer,
      or None where the format is not kept.
    hint: hint(prompts, hints [n, h] or None) -> prompts with those tokens in
      the hint slots, or blank ones; None for a task without slots.
    hint_length: h, number of hint slots.
    structure: positions of a solution that the format fixes, bool [c]; None for
      a task without a contract.
    steps: steps(prompts [n, p], completions [n, t]) -> float32 [n, t], 1 where
      a token is right after what the row wrote before it, right or wrong, else
      0; None for a task without steps.
  """

  name: str
  vocab: tuple[str, ...]
  pad_id: int
  eos_id: int
  prompt_length: int
  completion_length: int
  size: int
  sample: Callable[..., Examples]
  score: Callable[[Any, Any], Scores]
  parse: Callable[[Any], Any]
  hint: Callable[[Any, Any], np.ndarray] | None = None
  hint_length: int = 0
  structure: np.ndarray | None = None
  steps: Callable[[Any, Any], np.ndarray] | None = None


def encode(task: Task, text: str) -> np.ndarray:
  """Token ids of a text, one a character, int32 [l].

  Args:
    task: whose vocabulary.
    text: characters of it.

  Returns:
    The ids.

  Raises:
    ValueError: a character outside the vocabulary.
  """
  ids = {c: i for i, c in enumerate(task.vocab)}
  for c in text:
    if c not in ids:
      _checks.fail(
        "encode", "text", f"of the characters {''.join(task.vocab)!r}", repr(c)
      )
  return np.asarray([ids[c] for c in text], np.int32)


def decode(task: Task, ids: Any) -> str:
  """The text of token ids [l], up to EOS, without it and without padding.

  Args:
    task: whose vocabulary.
    ids: Shape [l].

  Returns:
    The text.
  """
  out = []
  for i in np.asarray(ids).tolist():
    if i == task.eos_id:
      break
    if i != task.pad_id:
      out.append(task.vocab[i])
  return "".join(out)


def _mixed(numbers: np.ndarray) -> np.ndarray:
  """Well-mixed 64-bit integers: neighbours fall on both sides of the split."""
  x = numbers.astype(np.uint64)
  for shift, factor in (
    (30, 0xBF58476D1CE4E5B9),
    (27, 0x94D049BB133111EB),
  ):
    x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
  return x ^ (x >> np.uint64(31))


def is_test(numbers: np.ndarray) -> np.ndarray:
  """Which problem numbers are held out: one in eight, by a fixed hash.

  Args:
    numbers: int64 [n].

  Returns:
    bool [n].
  """
  with np.errstate(over="ignore"):
    mixed = _mixed(np.asarray(numbers) + 1)
  return mixed % np.uint64(_TEST_SHARE) == 0


def _draw(size: int, n: int, seed: int, split: str, fn: str) -> np.ndarray:
  """n problem numbers of a split, uniform with replacement."""
  _checks.one_of(fn, "split", split, _SPLITS)
  if n < 1:
    _checks.fail(fn, "n", ">= 1", n)
  rng = np.random.default_rng([_SPLITS.index(split), seed])
  out = np.empty(0, np.int64)
  while out.size < n:
    numbers = rng.integers(size, size=_TEST_SHARE * n + 64)
    out = np.concatenate([out, numbers[is_test(numbers) == (split == "test")]])
  return out[:n]


def _digits(numbers: np.ndarray, bases: Sequence[int]) -> list[np.ndarray]:
  """Mixed-radix digits, the first base varies fastest."""
  out = []
  for base in bases:
    out.append(numbers % base)
    numbers = numbers // base
  return out


def _until_eos(completions: np.ndarray, eos: int) -> list[np.ndarray]:
  """The ids of each row up to its first EOS, included; all if there is none."""
  out = []
  for row in np.asarray(completions):
    at = np.flatnonzero(row == eos)
    out.append(row[: at[0] + 1] if at.size else row)
  return out


def _equal(rows: list[np.ndarray], solutions, where) -> np.ndarray:
  return np.asarray(
    [np.array_equal(r, s[w]) for r, s, w in zip(rows, solutions, where)], bool
  )


def _score_arrays(fn: str, task_length: int, prompts, completions):
  prompts, completions = np.asarray(prompts), np.asarray(completions)
  _checks.rank(fn, "prompts", prompts, 2, "[n, p]")
  _checks.rank(fn, "completions", completions, 2, "[n, t]")
  _checks.integer(fn, prompts=prompts, completions=completions)
  if prompts.shape[1] != task_length:
    _checks.fail(
      fn, "prompts", f"[n, {task_length}]", list(prompts.shape)
    )
  if len(prompts) != len(completions):
    _checks.fail(
      fn, "completions", f"[{len(prompts)}, t]", list(completions.shape)
    )
  return prompts, completions


# --- addition ----------------------------------------------------------------


def addition(*, digits: int = 2, reverse: bool = True) -> Task:
  """Sums of two numbers: "12+34=" -> "640", the digits of 046 reversed.

  The answer has digits + 1 characters, leading zeros included; reversed, each
  digit needs the carry of those before it only.

  Args:
    digits: of each number, in [1, 9].
    reverse: lowest digit first.

  Returns:
    A `Task`; reward 1 for the right sum.

  Raises:
    ValueError: digits out of range.
  """
  if not 1 <= digits <= 9:
    _checks.fail("addition", "digits", "in [1, 9]", digits)
  vocab = (PAD, EOS, *"0123456789+=")
  ids = {c: i for i, c in enumerate(vocab)}
  zero, eos, base = ids["0"], ids[EOS], 10**digits
  p, c = 2 * digits + 2, digits + 2

  def written(value, count):
    """Digits of a number, highest first, as ids [n, count]."""
    low = _digits(value, [10] * count)
    return np.stack(low[::-1], axis=1) + zero

  def solution(total):
    answer = written(total, digits + 1)
    answer = answer[:, ::-1] if reverse else answer
    return np.concatenate(
      [answer, np.full((len(answer), 1), eos)], axis=1
    ).astype(np.int32)

  def operands(prompts):
    weights = 10 ** np.arange(digits)[::-1]
    values = prompts - zero
    return (
      values[:, :digits] @ weights,
      values[:, digits + 1 : 2 * digits + 1] @ weights,
    )

  def sample(n, *, seed, split="train"):
    numbers = _draw(base * base, n, seed, split, "addition.sample")
    a, b = _digits(numbers, [base, base])
    sign = lambda s: np.full((n, 1), ids[s])
    prompts = np.concatenate(
      [written(a, digits), sign("+"), written(b, digits), sign("=")], axis=1
    ).astype(np.int32)
    completions = solution(a + b)
    return Examples(
      prompts, completions, np.ones(completions.shape, bool), numbers
    )

  def parse(completion):
    row = np.asarray(completion)
    values = row[:-1] - zero
    if row.shape != (c,) or row[-1] != eos or np.any(
      (values < 0) | (values > 9)
    ):
      return None
    return int("".join(map(str, values[::-1] if reverse else values)))

  def score(prompts, completions):
    prompts, completions = _score_arrays(
      "addition.score", p, prompts, completions
    )
    a, b = operands(prompts)
    rows = _until_eos(completions, eos)
    parsed = np.asarray([parse(r) is not None for r in rows], bool)
    want = solution(a + b)
    exact = _equal(rows, want, np.ones(want.shape, bool))
    return Scores(exact.astype(np.float32), parsed, exact, exact)

  return Task(
    name=f"addition_{digits}",
    vocab=vocab,
    pad_id=ids[PAD],
    eos_id=eos,
    prompt_length=p,
    completion_length=c,
    size=base * base,
    sample=sample,
    score=score,
    parse=parse,
  )


# --- chains ------------------------------------------------------------------


def chain(
  *, ops: int = 4, operators: str = "+-*", hints: bool = False
) -> Task:
  """Chains of operations mod 10 with their trace: "3+4*2=" -> "74".

  Evaluated from left to right, no precedence; the trace is the value after
  every operation, so its last digit is the answer. The reward looks at the
  answer alone: whoever guesses it from wrong steps is paid too, and `trace`
  tells.

  With hints the prompt opens with as many slots as the trace has digits, then
  ":". Blank slots hold the padding token (a token like any other, not masked).

  Args:
    ops: number of operations, in [1, 9].
    operators: out of "+-*".
    hints: with slots for a trace in front.

  Returns:
    A `Task`; `Scores.trace` says whether the whole trace is right.

  Raises:
    ValueError: an option out of range.
  """
  fn = "chain"
  if not 1 <= ops <= 9:
    _checks.fail(fn, "ops", "in [1, 9]", ops)
  if not operators or set(operators) - set("+-*"):
    _checks.fail(fn, "operators", "out of '+-*'", repr(operators))
  vocab = (PAD, EOS, *"0123456789+-*=:")
  ids = {c: i for i, c in enumerate(vocab)}
  zero, eos, pad = ids["0"], ids[EOS], ids[PAD]
  signs = np.asarray([ids[s] for s in operators])
  slots = ops + 1 if hints else 0  # the trace and ":"
  p, c = slots + 2 * ops + 2, ops + 1
  size = 10 * (10 * len(operators)) ** ops

  def step(prompts, i, value):
    """The value [n] after operation i, from that before it."""
    body = prompts[:, slots:]
    sign, x = body[:, 2 * i + 1], body[:, 2 * i + 2] - zero
    return np.select(
      [sign == ids["+"], sign == ids["-"]], [value + x, value - x], value * x
    ) % 10

  def traces(prompts):
    """The right values [n, ops] of the problems in the prompts."""
    value = prompts[:, slots].astype(np.int64) - zero
    out = []
    for i in range(ops):
      value = step(prompts, i, value)
      out.append(value)
    return np.stack(out, axis=1)

  def hint(prompts, hints=None):
    prompts = np.array(prompts, np.int32)
    if hints is None:
      prompts[:, :ops] = pad
    else:
      _checks.shape(
        "chain.hint", "hints", hints, (len(prompts), ops), "[n, h]", "prompts"
      )
      prompts[:, :ops] = hints
    return prompts

  def sample(n, *, seed, split="train"):
    numbers = _draw(size, n, seed, split, "chain.sample")
    first, *rest = _digits(numbers, [10] + [len(operators), 10] * ops)
    columns = [first + zero]
    for i in range(ops):
      columns += [signs[rest[2 * i]], rest[2 * i + 1] + zero]
    columns.append(np.full(n, ids["="]))
    blank = [np.full(n, pad)] * ops + [np.full(n, ids[":"])]
    prompts = np.stack((blank if hints else []) + columns, axis=1).astype(
      np.int32
    )
    completions = np.concatenate(
      [traces(prompts) + zero, np.full((n, 1), eos)], axis=1
    ).astype(np.int32)
    return Examples(
      prompts, completions, np.ones(completions.shape, bool), numbers
    )

  def parse(completion):
    row = np.asarray(completion)
    values = row[:-1] - zero
    if row.shape != (c,) or row[-1] != eos or np.any(
      (values < 0) | (values > 9)
    ):
      return None
    return tuple(values.tolist())

  def score(prompts, completions):
    prompts, completions = _score_arrays("chain.score", p, prompts, completions)
    want = traces(prompts)
    got = [parse(r) for r in _until_eos(completions, eos)]
    parsed = np.asarray([g is not None for g in got], bool)
    values = np.asarray([g or (-1,) * ops for g in got])
    exact = np.all(values == want, axis=1)
    reward = (values[:, -1] == want[:, -1]).astype(np.float32)
    return Scores(reward, parsed, exact, exact)

  def steps(prompts, completions):
    prompts, completions = _score_arrays("chain.steps", p, prompts, completions)
    written = completions.astype(np.int64) - zero
    out = np.zeros(completions.shape, np.float32)
    value = prompts[:, slots].astype(np.int64) - zero
    alive = np.ones(len(prompts), bool)
    for i in range(min(ops, out.shape[1])):
      out[:, i] = alive & (written[:, i] == step(prompts, i, value))
      value = written[:, i]
      alive &= (value >= 0) & (value <= 9)
    if out.shape[1] > ops:
      out[:, ops] = alive & (completions[:, ops] == eos)
    return out

  return Task(
    name=f"chain_{ops}" + ("_hints" if hints else ""),
    vocab=vocab,
    pad_id=pad,
    eos_id=eos,
    prompt_length=p,
    completion_length=c,
    size=size,
    sample=sample,
    score=score,
    parse=parse,
    hint=hint if hints else None,
    hint_length=ops if hints else 0,
    steps=steps,
  )


# --- structured output -------------------------------------------------------

_CONTENT = {
  "copy": lambda d: d,
  "sort": lambda d: np.sort(d, axis=1),
  "double": lambda d: 2 * d % 10,
}


def json_list(
  *, items: int = 3, content: Literal["copy", "sort", "double"] = "sort"
) -> Task:
  """Lists under a format contract: "372=" -> "[2,3,7]".

  The contract: "[", exactly `items` digits with one "," between, "]" and EOS.
  After a digit the model chooses between "," and "]": a structural token, which
  `Task.structure` marks, and whose loss breaks the parse whatever the digits.

  `sample` takes `broken` in [0, 1], the share of solutions that close the list
  too early (after 1 ... items - 1 digits, uniform): data for a base that keeps
  the contract only so often.

  Args:
    items: number of digits, in [2, 9].
    content: what the list holds of the prompt's digits: those ("copy"), those
      in ascending order ("sort"), or each one doubled mod 10 ("double").

  Returns:
    A `Task`; reward is the share of digits that are right at their place, 0
    where the contract is broken.

  Raises:
    ValueError: an option out of range.
  """
  fn = "json_list"
  if not 2 <= items <= 9:
    _checks.fail(fn, "items", "in [2, 9]", items)
  _checks.one_of(fn, "content", content, _CONTENT)
  vocab = (PAD, EOS, *"0123456789[],=")
  ids = {c: i for i, c in enumerate(vocab)}
  zero, eos, pad = ids["0"], ids[EOS], ids[PAD]
  p, c = items + 1, 2 * items + 2
  # "[" d "," d ... d "]" EOS
  frame = np.full(c, ids[","])
  frame[[0, c - 2, c - 1]] = ids["["], ids["]"], eos
  structure = np.ones(c, bool)
  structure[1 : c - 1 : 2] = False

  def wanted(prompts):
    return _CONTENT[content](prompts[:, :items].astype(np.int64) - zero)

  def sample(n, *, seed, split="train", broken=0.0):
    name = "json_list.sample"
    _checks.in_range(name, "broken", broken, 0, 1)
    numbers = _draw(10**items, n, seed, split, name)
    given = np.stack(_digits(numbers, [10] * items), axis=1) + zero
    prompts = np.concatenate(
      [given, np.full((n, 1), ids["="])], axis=1
    ).astype(np.int32)
    completions = np.tile(frame, (n, 1))
    completions[:, ~structure] = wanted(prompts) + zero
    # A seed of its own: `broken` must not change which problems are drawn.
    rng = np.random.default_rng([2, _SPLITS.index(split), seed])
    early, kept = rng.random(n) < broken, rng.integers(1, items, size=n)
    kept = np.where(early, kept, items)[:, None]
    at = np.arange(c)[None, :]
    completions = np.where(at == 2 * kept, ids["]"], completions)
    completions = np.where(at == 2 * kept + 1, eos, completions)
    where = at <= 2 * kept + 1
    completions = np.where(where, completions, pad).astype(np.int32)
    return Examples(prompts, completions, where, numbers)

  def parse(completion):
    row = np.asarray(completion)
    if row.shape != (c,) or np.any(row[structure] != frame[structure]):
      return None
    values = row[~structure] - zero
    if np.any((values < 0) | (values > 9)):
      return None
    return tuple(values.tolist())

  def score(prompts, completions):
    prompts, completions = _score_arrays(
      "json_list.score", p, prompts, completions
    )
    want = wanted(prompts)
    got = [parse(r) for r in _until_eos(completions, eos)]
    parsed = np.asarray([g is not None for g in got], bool)
    values = np.asarray([g or (-1,) * items for g in got])
    right = values == want
    exact = np.all(right, axis=1)
    return Scores(
      np.mean(right, axis=1, dtype=np.float32), parsed, exact, exact
    )

  return Task(
    name=f"json_list_{items}_{content}",
    vocab=vocab,
    pad_id=pad,
    eos_id=eos,
    prompt_length=p,
    completion_length=c,
    size=10**items,
    sample=sample,
    score=score,
    parse=parse,
    structure=structure,
  )


__all__ = [
  "Examples",
  "Scores",
  "Task",
  "addition",
  "chain",
  "decode",
  "encode",
  "is_test",
  "json_list",
]
