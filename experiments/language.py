"""Problems of language: tasks with verifiable rewards, and an exact model."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import data, lm, losses, models, oracles, train
from experiments import language_figures

TASKS = {
  "addition": data.addition,
  "chain": data.chain,
  "json_list": data.json_list,
}


class Model(NamedTuple):
  """One trained (or known) model: what an evaluation needs of it.

  Attributes:
    stage: block of the config that it is from, or its known name.
    apply_fn: its network.
    params: its parameters.
    replicate: number of the repetition.
  """

  stage: str
  apply_fn: Callable[..., Any]
  params: Any
  replicate: int = 0


class TextProblem:
  """A task of `distilljax.data`: prompts, solutions, rewards, scores.

  Args:
    config: a config of `configs/`.

  Attributes:
    task: the task.
    headline: metric that a run's last line names.
    known: names of models that need no training.
    watchable: metrics that can be watched during training.
  """

  known = ()
  watchable = ("answer", "trace")

  def __init__(self, config: Mapping[str, Any]):
    self._evaluation = config["evaluation"]
    self.headline = self._evaluation["headline"]
    self.task = TASKS[config["data"]["name"]](**config["task"])
    examples = self.task.sample(
      self._evaluation["n"],
      seed=self._evaluation["noise_seed"],
      split="test",
    )
    self._test = examples
    self._rows = config["data"]["rows"]
    self._programs = {}

  def model(self, block: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters that the task fixes, for a network of the zoo."""
    if block["kind"] != "transformer":
      raise ValueError(
        f"config: model.kind must be 'transformer', got {block['kind']!r}"
      )
    return {"vocab_size": len(self.task.vocab)}

  def sampler(self) -> dict[str, Any]:
    """Settings of every sampler of this task."""
    return {
      "max_new_tokens": self.task.completion_length,
      "eos_id": self.task.eos_id,
      "pad_id": self.task.pad_id,
    }

  def functions(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
    """The functions that a method's hyper-parameters name."""
    name = hyper.get("reward") or "reward"
    if name not in ("reward", "trace"):
      raise ValueError(
        f"config: hyper.reward must be 'reward' or 'trace', got {name!r}"
      )
    task, length = self.task, self.task.hint_length

    def evidence(prompts, solutions):
      return prompts.at[:, :length].set(solutions[:, :length])

    return {
      "reward": lambda p, t: np.asarray(getattr(task.score(p, t), name)),
      "evidence": evidence if length else None,
      "steps": task.steps,
    }

  def batches(
    self,
    batch_size: int,
    seed: int,
    options: Mapping[str, Any],
  ) -> Callable[[], Any]:
    """() -> iterator over prompts and solutions.

    Args:
      batch_size: rows of a batch.
      seed: of the rows and their order.
      options: "hints", share of rows whose hint slots hold the solution;
        others go to the task's `sample` (`broken` of json_list).
    """
    options = dict(options)
    hints = options.pop("hints", 0.0)
    examples = self.task.sample(
      self._rows, seed=seed, split="train", **options
    )
    prompts = examples.prompts
    if hints:
      shown = np.random.default_rng([seed, 1]).random(len(prompts)) < hints
      filled = self.task.hint(
        prompts, examples.completions[:, : self.task.hint_length]
      )
      prompts = np.where(shown[:, None], filled, prompts)
    arrays = {
      "prompts": prompts,
      "tokens": examples.completions,
      "where": examples.where,
    }
    return lambda: data.make_iterator(
      arrays, batch_size, seed=seed, name=self.task.name
    )

  # --- scores ---------------------------------------------------------------

  def _program(self, name, apply_fn, make):
    """One jitted function for a network's function, kept."""
    key = (name, apply_fn)
    if key not in self._programs:
      self._programs[key] = make()
    return self._programs[key]

  def _sample(
    self, model: Model, temperature: float, draw: int = 0
  ) -> lm.Rollout:
    """Completions of the held-out prompts, under keys that all models share."""
    sample = self._program(
      f"sample {temperature}",
      model.apply_fn,
      lambda: lm.make_sampler(
        model.apply_fn, temperature=temperature, **self.sampler()
      ),
    )
    seed = self._evaluation["noise_seed"]
    key = jax.random.key(seed, impl="threefry2x32")
    keys = train.row_keys(
      train.named_key(key, f"draw {draw}") if draw else key,
      len(self._test.prompts),
    )
    return sample(model.params, jnp.asarray(self._test.prompts), keys)

  def _logits(self, model: Model, prompts, tokens, where):
    run = self._program(
      "logits",
      model.apply_fn,
      lambda: jax.jit(
        lambda params, p, t, w: lm.completion_logits(
          model.apply_fn, params, p, t, where=w
        )
      ),
    )
    return run(
      model.params, jnp.asarray(prompts), jnp.asarray(tokens),
      jnp.asarray(where),
    )

  def _speed(self, model: Model, tokens: int) -> float:
    """Sampled tokens a second: the best of three calls."""
    times = []
    for _ in range(3):
      began = time.perf_counter()
      jax.block_until_ready(self._sample(model, 1.0).tokens)
      times.append(time.perf_counter() - began)
    return tokens / min(times)

  def score(self, model: Model, teacher: Model | None) -> dict[str, float]:
    """Metric -> value of one model on the held-out prompts.

    Args:
      model: what is scored.
      teacher: what KLs are to; None leaves them out.
    """
    prompts = self._test.prompts
    drawn, greedy = self._sample(model, 1.0), self._sample(model, 0.0)
    scores = self.task.score(prompts, np.asarray(drawn.tokens))
    best = self.task.score(prompts, np.asarray(greedy.tokens))
    mean = lambda x: float(np.mean(x))
    out = {
      "answer": mean(scores.reward),
      "trace": mean(scores.trace),
      "parsed": mean(scores.parsed),
      "answer_greedy": mean(best.reward),
      "trace_greedy": mean(best.trace),
    }
    if self.task.structure is not None:
      kept = scores.reward[scores.parsed]
      # Of no parsed output there is no content to judge.
      out["content"] = mean(kept) if len(kept) else 0.0
    logits = self._logits(model, drawn.prompts, drawn.tokens, drawn.where)
    per_token = _masked(losses.entropy(logits), drawn.where)
    out["entropy"] = float(per_token / np.sum(drawn.where))
    if teacher is not None:
      target = self._logits(teacher, drawn.prompts, drawn.tokens, drawn.where)
      rows = len(prompts)
      out["reverse_kl"] = float(
        _masked(losses.reverse_kl(logits, target), drawn.where) / rows
      )
      theirs = self._sample(teacher, 1.0)
      given = (theirs.prompts, theirs.tokens, theirs.where)
      out["forward_kl"] = float(
        _masked(
          losses.forward_kl(
            self._logits(model, *given), self._logits(teacher, *given)
          ),
          theirs.where,
        )
        / rows
      )
    if self.task.structure is not None:
      out["off_modal"] = float(np.max(self.off_modal(model)))
    out["tokens_per_second"] = self._speed(model, int(np.sum(drawn.where)))
    return out

  def off_modal(self, model: Model) -> np.ndarray:
    """Mass beside the token that the contract wants, [structural positions].

    Mean over the held-out prompts, reading the right solution before it.
    """
    logits = self._logits(
      model, self._test.prompts, self._test.completions, self._test.where
    )
    right = np.exp(
      lm.token_log_probs(logits, jnp.asarray(self._test.completions))
    )
    return 1 - np.mean(right, axis=0)[self.task.structure]

  def watched(self, model: Model) -> dict[str, float]:
    """A cheap score during training."""
    scores = self.task.score(
      self._test.prompts, np.asarray(self._sample(model, 1.0).tokens)
    )
    return {
      "answer": float(np.mean(scores.reward)),
      "trace": float(np.mean(scores.trace)),
    }

  def floors(self) -> list[dict[str, Any]]:
    """What guessing gets: the most frequent answer to every prompt."""
    test = self._test
    wrong = np.roll(test.completions, 1, axis=0)
    scores = self.task.score(test.prompts, wrong)
    n = len(test.prompts)
    return [
      _row("floor: another prompt's solution", metric, value, n)
      for metric, value in (
        ("answer", np.mean(scores.reward)),
        ("trace", np.mean(scores.trace)),
      )
    ]

  def facts(self, of: Mapping[str, list[Model]]) -> dict[str, Any]:
    """Numbers about the models' relation, for the summary."""
    out = {}
    if reader := self._evaluation.get("evidence"):
      out["evidence"] = self.evidence_by_token(of[reader][0])
    if wanted := self._evaluation.get("threshold"):
      out["cliff"] = self._cliff(of, wanted)
    return out

  def evidence_by_token(self, model: Model) -> dict[str, float]:
    """Where contrastive evidence lies: mean |Delta| by kind of token, nats.

    Rollouts of the held-out prompts are read under the right solution and under
    a second, rejected rollout (prompts without one are left out). Tokens fall
    into those where the two shown traces differ, those where they agree, and
    the end of the text, which is no part of either.
    """
    task, length = self.task, self.task.hint_length
    prompts, right = self._test.prompts, self._test.completions
    drawn = np.asarray(self._sample(model, 1.0).tokens)
    wrong = np.asarray(self._sample(model, 1.0, draw=1).tokens)
    rejected = task.score(prompts, wrong).reward < 0.5
    ids = [i for i, word in enumerate(task.vocab) if word.isdigit()]
    # A hint is digits: a rollout cut short has none to show.
    rejected &= np.all(np.isin(wrong[:, :length], ids), axis=1)
    where = np.ones(drawn.shape, bool)

    def log_probs(shown):
      hinted = task.hint(prompts, shown[:, :length])
      logits = self._logits(model, hinted, drawn, where)
      return np.asarray(lm.token_log_probs(logits, jnp.asarray(drawn)))

    shown = np.where(rejected[:, None], wrong, right)
    delta = np.abs(log_probs(right) - log_probs(shown))
    wide = ((0, 0), (0, drawn.shape[1] - length))
    differ = np.pad(right[:, :length] != wrong[:, :length], wide)
    digit = np.isin(drawn, ids)
    kinds = {
      "differing": digit & differ,
      "agreeing": digit & ~differ,
      "end": drawn == task.eos_id,
    }
    found = {k: delta[m & rejected[:, None]] for k, m in kinds.items()}
    return {
      "rows": int(np.sum(rejected)),
      **{k: float(np.mean(x)) if len(x) else None for k, x in found.items()},
    }

  def _cliff(self, of, wanted) -> dict[str, Any]:
    p, b = (
      1 - self.off_modal(of[wanted[name]][0]) for name in ("teacher", "base")
    )
    clamp = lambda x: np.clip(x.astype(np.float64), 1e-6, 1 - 1e-6)
    scales = losses.extrapolation_threshold(clamp(p), clamp(b), wanted["c"])
    return {
      "p": p.tolist(),
      "b": b.tolist(),
      "c": wanted["c"],
      "thresholds": [float(s) for s in np.atleast_1d(scales)],
      "binding": float(np.min(scales)),
    }

  def figures(self, shown: Sequence[Model], names: Mapping[str, str]):
    """Rollouts of the first prompts, a column a model."""
    count = min(self._evaluation["shown"], len(self._test.prompts))
    decode = functools.partial(data.decode, self.task)
    columns = [
      ("prompt", [decode_prompt(self.task, p) for p in self._test.prompts]),
      ("solution", [decode(c) for c in self._test.completions]),
    ]
    right = []
    for model in shown:
      tokens = np.asarray(self._sample(model, 1.0).tokens)
      columns.append((names[model.stage], [decode(t) for t in tokens]))
      right.append(self.task.score(self._test.prompts, tokens).exact)
    cells = [[text[i] for _, text in columns] for i in range(count)]
    marks = [[None, None] + [bool(r[i]) for r in right] for i in range(count)]
    return [
      language_figures.text_table(
        [name for name, _ in columns],
        cells,
        marks,
        title="Rollouts before and after",
        caption=(
          "Sampled at temperature 1 for the same held-out prompts under the"
          " same keys; struck colour: not the right solution."
        ),
      )
    ]


def decode_prompt(task: data.Task, ids: Any) -> str:
  """A prompt's text; blank slots are kept as they are."""
  return "".join(task.vocab[i] for i in np.asarray(ids))


def _masked(values, where) -> float:
  return float(jnp.sum(jnp.where(where, values, 0)))


def _row(model, metric, value, n, **more) -> dict[str, Any]:
  return {
    "model": model,
    "steps": None,
    "metric": metric,
    "value": float(value),
    "n": n,
    **more,
  }


class MarkovProblem:
  """The exact model: every number is a finite sum, nothing is sampled.

  Base N(0, 1) transitions from a uniform start, a table of rewards, and the
  teacher base + tilt * reward. Every repetition draws its own tables.

  Args:
    config: a config of `configs/`.
  """

  known = ("base", "teacher")
  headline = "return"
  watchable = ("return",)

  def __init__(self, config: Mapping[str, Any]):
    task = dict(config["task"])
    self._v, self._length = task["vocab_size"], task["length"]
    self._tilt, self._seed = task["tilt"], config["seed"]
    self._evaluation = config["evaluation"]
    self._scales = {
      name: config[name]["hyper"].get("reward_scale")
      for name in config["stages"]
    }

  def model(self, block: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing is left open."""
    if block["kind"] != "markov":
      raise ValueError(
        f"config: model.kind must be 'markov', got {block['kind']!r}"
      )
    return {"vocab_size": self._v}

  def sampler(self) -> dict[str, Any]:
    """Completions of fixed length: the first token is the prompt."""
    return {"max_new_tokens": self._length - 1, "eos_id": None, "pad_id": 0}

  def functions(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Rewards are tables, not functions of text."""
    del hyper
    return {"reward": None, "evidence": None, "steps": None}

  def tables(self, replicate: int) -> tuple[Any, Any, Any]:
    """(base, reward, teacher), logits and rewards [v, v]."""
    key = jax.random.key(self._seed + replicate, impl="threefry2x32")
    shape = (self._v, self._v)
    draw = lambda name: jax.random.normal(train.named_key(key, name), shape)
    base = jax.nn.log_softmax(draw("base"))
    reward = draw("reward")
    return base, reward, jax.nn.log_softmax(base + self._tilt * reward)

  def known_params(self, name: str, replicate: int) -> dict[str, Any]:
    """Parameters of a model that needs no training."""
    base, _, teacher = self.tables(replicate)
    return {"transition": base if name == "base" else teacher}

  def batches(
    self, batch_size: int, seed: int, options: Mapping[str, Any]
  ) -> Callable[[], Any]:
    """() -> iterator over first tokens and sequences of the teacher."""
    if options:
      raise ValueError(
        f"config: data of a stage must be empty, got {dict(options)}"
      )

    def iterator():
      rows, replicate = 4096, seed - self._seed
      key = train.named_key(
        jax.random.key(seed, impl="threefry2x32"), "sequences"
      )
      teacher = oracles.MarkovLM(
        jnp.zeros(self._v), self.known_params("teacher", replicate)[
          "transition"
        ]
      )
      ids = np.asarray(
        oracles.sample_sequences(key, teacher, rows=rows, length=self._length)
      )
      arrays = {
        "prompts": ids[:, :1],
        "tokens": ids[:, 1:],
        "where": np.ones(ids[:, 1:].shape, bool),
      }
      return data.make_iterator(arrays, batch_size, seed=seed, name="markov")

    return iterator

  def _lm(self, params) -> oracles.MarkovLM:
    return oracles.MarkovLM(jnp.zeros(self._v), params["transition"])

  def score(self, model: Model, teacher: Model | None) -> dict[str, float]:
    """Exact KL to the optimum of the stage's objective, return, entropy."""
    del teacher
    base, reward, target = self.tables(model.replicate)
    scale = self._scales.get(model.stage)
    ours = self._lm(model.params)
    out = {}
    if model.stage not in self.known:
      optimum = oracles.geometric_optimum(
        target, base, reward_scale=1.0 if scale is None else scale
      )
      out["target_kl"] = oracles.sequence_kl(
        ours, self._lm({"transition": optimum}), length=self._length
      )
    out["return"] = oracles.expected_return(ours, reward, length=self._length)
    out["reverse_kl"] = oracles.sequence_kl(
      ours, self._lm({"transition": target}), length=self._length
    )
    out["sequence_entropy"] = oracles.sequence_entropy(
      ours, length=self._length
    )
    # A KL of 1e-9 is rounding, on either side of 0.
    return {
      k: max(float(v), 0.0) if k.endswith("kl") else float(v)
      for k, v in out.items()
    }

  def watched(self, model: Model) -> dict[str, float]:
    """The headline, exactly."""
    return {self.headline: self.score(model, None)[self.headline]}

  def floors(self) -> list[dict[str, Any]]:
    """Exact: nothing has noise."""
    return []

  def facts(self, of: Mapping[str, list[Model]]) -> dict[str, Any]:
    """Nothing to add."""
    del of
    return {}

  def figures(self, shown, names):
    """No texts to show."""
    del shown, names
    return []


def make_problem(config: Mapping[str, Any]) -> TextProblem | MarkovProblem:
  """The problem that a config's `data.name` names."""
  name = config["data"]["name"]
  if name == "markov":
    return MarkovProblem(config)
  if name not in TASKS:
    raise ValueError(
      f"config: data.name must be one of {sorted([*TASKS, 'markov'])}, got"
      f" {name!r}"
    )
  return TextProblem(config)


def make_network(hyper: Mapping[str, Any], key: jax.Array) -> models.Network:
  """A network from plain values: of the zoo, or the exact model."""
  hyper = dict(hyper)
  kind = hyper.pop("kind")
  if kind == "markov":
    v = hyper["vocab_size"]
    return models.from_callable(
      oracles.markov_apply, {"transition": jnp.zeros((v, v))}
    )
  return models.make(kind, key, **hyper)
