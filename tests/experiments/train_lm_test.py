"""The launcher of language models: one line for bad input, whole small runs."""

import json
import signal
import types

import jax
import numpy as np
import pytest

from distilljax import train
from distilljax.train import config as config_lib
from distilljax.train import report
from experiments import language, language_figures, language_job
from experiments import train_lm as launcher
from tests import helpers
from tests.experiments.launching import (
  command,
  one_device,
  signals,  # noqa: F401 (a fixture of every test here)
)

CHAIN = "configs/opd_chain.py:runlocal"
EXACT = "configs/gopd_markov.py:runlocal"
SUMS = "configs/gkd_addition.py:runlocal"


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
  """A small job of two stages, start to end."""
  folder = tmp_path_factory.mktemp("sums")
  lines = []
  config = config_lib.load(SUMS)
  with config.unlocked():
    config.evaluation.watches = 1
    config.run.keep_best = "trace"
  with helpers.as_user():
    language_job.train_and_evaluate(
      config, folder, command="cmd", log=lines.append,
      mesh=one_device(),
    )
  return folder, json.loads((folder / "summary.json").read_text()), lines


@pytest.mark.parametrize(
  "arguments,match",
  [
    ([f"--config={CHAIN}", "--config.opd.stpes=3"], "did you mean 'opd.steps'"),
    ([f"--config={CHAIN}", "--config.data.name=chian"], "must be one of"),
    ([f"--config={CHAIN}", "--config.model.kind=mlp"], "must be 'transformer'"),
    ([f"--config={CHAIN}", "--config.seeds=0"], "seeds must be >= 1"),
    (
      [f"--config={CHAIN}", "--config.teacher.hyper.reward=speed"],
      "must be 'reward' or 'trace', got 'speed'",
    ),
    (
      [f"--config={CHAIN}", "--config.kd.networks.teacher.start=opd"],
      "start must be one of",
    ),
    (
      [f"--config={SUMS}", "--config.stages=('teacher','student','studnet')"],
      "stage 'studnet' has no block",
    ),
    (
      [f"--config={CHAIN}", "--config.evaluation.teacher=warn"],
      "evaluation names 'warn'",
    ),
    (
      [f"--config={CHAIN}", "--config.data.batch_size=30"],
      "divisible by 8 devices, got 30; nearest: 32",
    ),
    ([f"--config={CHAIN}", "--config.task.ops=12"], "ops must be in [1, 9]"),
    ([f"--config={EXACT}", "--config.model.kind=mlp"], "must be 'markov'"),
    (
      [f"--config={CHAIN}", "--config.run.keep_best=parsed"],
      "keep_best must be one of ('answer', 'trace'), got 'parsed'",
    ),
    ([f"--config={CHAIN}", "more"], "unknown argument 'more'"),
    ([], "give --config="),
  ],
)
def test_bad_input_stops_before_any_work(capsys, tmp_path, arguments, match):
  folder = tmp_path / "run"
  code, _, err = command(
    launcher, capsys, *arguments, f"--workdir={folder}", "--compile_cache=off"
  )
  lines = [r for r in err.splitlines() if r.strip()]
  assert code in (1, 2), err
  assert len(lines) == 1 and match in lines[0], err
  assert not folder.exists()


def test_a_sampler_that_the_loss_does_not_assume_is_refused():
  config = config_lib.load("configs/cliff_json.py:runlocal")
  with config.unlocked():
    config.scale_200.hyper.sampling_temperature = 0.5
  with helpers.one_line_error("scale_200: .*temperature .sampler 0.5, loss 1"):
    language_job.build(config)
  config = config_lib.load(CHAIN)
  with config.unlocked():
    config.opd.hyper.eos_id = 5
  with helpers.one_line_error("opd: .*eos_id"):
    language_job.build(config)


@pytest.mark.slow
def test_a_run_leaves_everything(sums):
  folder, summary, lines = sums
  for name in (
    "config.json", "metrics.jsonl", "summary.json", "report.html", "checkpoints"
  ):
    assert (folder / name).exists(), name
  rows = {(r["model"], r["metric"]): r for r in summary["scores"]}
  assert len(rows) == len(summary["scores"])
  for model in ("teacher", "student"):
    for metric in (
      "answer", "trace", "parsed", "answer_greedy", "trace_greedy",
      "entropy", "reverse_kl", "forward_kl", "tokens_per_second",
    ):
      row = rows[model, metric]
      assert np.isfinite(row["value"]) and row["n"] == 64
      assert row["steps"] is None
  for metric in ("reverse_kl", "forward_kl"):
    assert rows["teacher", metric]["value"] == 0
    assert rows["student", metric]["value"] > 0
  assert rows["student", "tokens_per_second"]["value"] > 0
  # The headline comes first: tiles and chart show it.
  assert summary["scores"][0]["metric"] == "answer"
  assert {
    "seconds", "cpu_seconds", "compile_seconds", "peak_memory_bytes",
    "params_sha256", "versions", "seed", "seeds", "floors",
  } <= set(summary)
  assert set(summary["parameters"]) == {
    "teacher/student", "student_0/student", "student_0/teacher"
  }
  assert summary["floors"][0]["model"].startswith("floor")
  assert lines[-1].startswith("reached answer: teacher")
  page = (folder / "report.html").read_text()
  assert "Rollouts before and after" in page and "cmd" in page
  assert "Training: student_0" in page


@pytest.mark.slow
def test_scores_during_training_are_written(sums):
  folder, summary, _ = sums
  text = (folder / "metrics.jsonl").read_text()
  lines = [json.loads(row) for row in text.splitlines()]
  last = [r for r in lines if "eval/answer" in r]
  assert [r["stage"] for r in last] == ["teacher", "student_0"]
  # The last one is of the final weights: the summary's.
  for row, model in zip(last, ("teacher", "student")):
    found = [
      r["value"] for r in summary["scores"]
      if (r["model"], r["metric"]) == (model, "answer")
    ]
    np.testing.assert_allclose(row["eval/answer"], found[0], atol=1e-6)
    best = summary["best"][row["stage"]]
    assert best["metric"] == "eval/trace" and best["step"] == row["step"]
    assert best["value"] == row["eval/trace"]


@pytest.mark.slow
def test_the_same_command_says_that_it_is_finished(sums, capsys):
  folder, *_ = sums
  before = (folder / "summary.json").read_bytes()
  code, out, _ = command(
    launcher, capsys, f"--config={SUMS}", "--config.evaluation.watches=1",
    "--config.run.keep_best=trace",
    f"--workdir={folder}", "--compile_cache=off",
  )
  assert code == 0 and "finished before" in out
  assert (folder / "summary.json").read_bytes() == before


def test_stages_start_where_they_say():
  """The student's own size, the same repetition, exact known models."""
  config = config_lib.load(CHAIN)
  with config.unlocked():
    config.seeds = 2
  built = language_job.build(config, mesh=one_device())
  names = [s.name for s in built.stages]
  assert names[:3] == ["base", "teacher", "warm_0"]
  opd = built.stages[names.index("opd_1")]
  key = jax.random.key(0)
  base = built.stages[0].init(key, {})
  results = {"base": base, "teacher": base}
  for i in range(2):
    stage = built.stages[names.index(f"warm_{i}")]
    results[f"warm_{i}"] = stage.init(jax.random.key(i), results)
  start = opd.init(key, results)
  same = lambda a, b: all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
  )
  assert same(start["student"], results["warm_1"]["student"])
  assert not same(start["student"], results["warm_0"]["student"])
  assert same(start["teacher"], base["student"])
  # One function a kind of network, so that programs are shared.
  assert built.networks["warm"] is built.networks["opd"]
  assert built.networks["base"] is built.networks["teacher"]


@pytest.mark.slow
def test_the_exact_job_and_its_resume(tmp_path):
  """SIGTERM in the middle; the resumed run ends in the same bits."""
  config = config_lib.load(EXACT)
  with config.unlocked():
    config.stages = ("scale_200",)
    del config.scale_100
    config.evaluation.models = ("base", "teacher", "scale_200")
    config.evaluation.sweep.stages = ("scale_200",)

  class Stop(train.Hook):
    def on_step(self, moment):
      if moment.stage.name == "scale_200_0" and moment.step == 7:
        signal.raise_signal(signal.SIGTERM)

  run = lambda folder, **more: language_job.train_and_evaluate(
    config, folder, log=lambda _: None, mesh=one_device(), **more
  )
  whole = run(tmp_path / "a")
  with pytest.raises(train.Interrupted, match="saved. The same command"):
    run(tmp_path / "b", hooks=[Stop()])
  again = run(tmp_path / "b")
  assert again["params_sha256"] == whole["params_sha256"]
  assert again["scores"] == whole["scores"]
  rows = {(r["model"], r["metric"]): r["value"] for r in whole["scores"]}
  base, teacher, student = (
    rows[m, "return"] for m in ("base", "teacher", "reward scale 2")
  )
  assert base < teacher and base < student  # 20 of 150 steps
  assert 0 < rows["reward scale 2", "target_kl"] < 1.0
  assert "Sweep over reward_scale" in (tmp_path / "a/report.html").read_text()


def test_evidence_and_rewards_are_the_tasks():
  config = config_lib.load("configs/cepo_chain.py:runlocal")
  problem = language.make_problem(config)
  task = problem.task
  rows = task.sample(4, seed=0, split="train")
  functions = problem.functions({})
  shown = functions["evidence"](
    jax.numpy.asarray(rows.prompts), jax.numpy.asarray(rows.completions)
  )
  np.testing.assert_array_equal(
    shown, task.hint(rows.prompts, rows.completions[:, : task.hint_length])
  )
  wrong = rows.completions.copy()
  wrong[:, 0] = np.where(wrong[:, 0] == 2, 3, 2)  # the first step alone
  reward = functions["reward"](rows.prompts, wrong)
  np.testing.assert_array_equal(reward, np.ones(4))
  trace = problem.functions({"reward": "trace"})["reward"](rows.prompts, wrong)
  np.testing.assert_array_equal(trace, np.zeros(4))
  steps = functions["steps"](rows.prompts, wrong)
  np.testing.assert_array_equal(steps[:, 0], np.zeros(4))
  np.testing.assert_array_equal(steps[:, 2:], np.ones((4, 3)))


def test_evidence_lies_where_the_traces_differ():
  """A model that copies what its slots show, 3 nats for the shown digit."""
  problem = language.make_problem(
    config_lib.load("configs/cepo_chain.py:runlocal")
  )
  task, n = problem.task, problem.task.hint_length
  v, start = len(task.vocab), task.prompt_length - 1
  zero, end = task.vocab.index("0"), task.eos_id

  def apply(params, tokens, **_):
    shown = tokens[:, : task.prompt_length][:, :n]
    logits = jax.numpy.full((*tokens.shape, v), params["low"])
    at = jax.numpy.arange(n)[None, :] + start
    row = jax.numpy.arange(len(tokens))[:, None]
    logits = logits.at[:, :, zero : zero + 10].set(0.0)
    logits = logits.at[row, at, shown].add(3.0)
    # The end is certain behind the trace.
    return logits.at[:, start + n, end].set(50.0)

  model = language.Model("x", apply, {"low": jax.numpy.float32(-50.0)})
  rng = np.random.default_rng(0)
  right = problem._test.completions
  digits = lambda: np.concatenate(
    [rng.integers(zero, zero + 10, right[:, :n].shape), right[:, n:]], axis=1
  )
  drawn, wrong = digits(), digits()
  wrong[: len(wrong) // 2, :n] = right[: len(wrong) // 2, :n]  # not rejected
  rollouts = {0: drawn, 1: wrong}
  problem._sample = lambda model, temperature, draw=0: types.SimpleNamespace(
    tokens=rollouts[draw]
  )
  found = problem.facts({"base": [model]})["evidence"]
  kept = wrong[:, n - 1] != right[:, n - 1]  # the last digit is the reward
  kept[: len(wrong) // 2] = False
  differ = (right != wrong)[:, :n] & kept[:, None]
  hit = (drawn == right)[:, :n] | (drawn == wrong)[:, :n]
  assert found["rows"] == kept.sum() > 5
  np.testing.assert_allclose(
    found["differing"], 3.0 * hit[differ].mean(), rtol=1e-5
  )
  assert 0 < found["differing"] < 3
  assert abs(found["agreeing"]) < 1e-5 and abs(found["end"]) < 1e-5


def test_hints_are_shown_at_their_share():
  config = config_lib.load("configs/cepo_chain.py:runlocal")
  problem = language.make_problem(config)
  batches = problem.batches(512, 0, {"hints": 0.25})()
  rows = next(batches)
  task = problem.task
  slots = rows["prompts"][:, : task.hint_length]
  filled = np.all(slots == rows["tokens"][:, : task.hint_length], axis=1)
  blank = np.all(slots == task.pad_id, axis=1)
  assert np.all(filled | blank)
  assert abs(filled.mean() - 0.25) < 0.08  # 4 standard errors
  assert np.all(rows["prompts"][:, task.hint_length] == task.vocab.index(":"))


def test_the_cliff_is_quoted_at_the_binding_position():
  """A model that is the exact table of the contract's first position."""
  config = config_lib.load("configs/cliff_json.py:runlocal")
  problem = language.make_problem(config)
  found = {"teacher": [0.05, 0.02], "base": [0.4, 0.5]}
  problem.off_modal = lambda model: np.asarray(found[model.stage])
  of = {
    name: [language.Model(name, None, None)] for name in ("teacher", "base")
  }
  cliff = problem.facts(of)["cliff"]
  logit = lambda p: np.log(p / (1 - p))
  expected = [
    1 + np.log(1 + 2 / p) / (logit(p) - logit(b))
    for p, b in ((0.95, 0.6), (0.98, 0.5))
  ]
  np.testing.assert_allclose(cliff["thresholds"], expected, rtol=1e-9)
  assert cliff["binding"] == min(cliff["thresholds"])
  assert cliff["c"] == 3.0


def test_off_modal_mass_reads_the_structure(monkeypatch):
  config = config_lib.load("configs/cliff_json.py:runlocal")
  problem = language.make_problem(config)
  task = problem.task
  v = len(task.vocab)

  def apply(params, tokens, **_):
    del params
    # Always "," with probability .7, the rest spread evenly.
    p = np.full(v, 0.3 / (v - 1))
    p[task.vocab.index(",")] = 0.7
    return jax.numpy.broadcast_to(np.log(p), (*tokens.shape, v))

  off = problem.off_modal(language.Model("x", apply, {}))
  # "[" , , "]" EOS: two of five structural tokens are the comma.
  other = 1 - 0.3 / (v - 1)
  np.testing.assert_allclose(off, [other, 0.3, 0.3, other, other], atol=1e-6)


def test_figures_hold_what_they_show():
  table = language_figures.text_table(
    ["prompt", "student"], [["1+1=", "2"], ["2+2=", "5"]],
    [[None, True], [None, False]], title="t", caption="c",
  )
  assert table.data == {"prompt": ["1+1=", "2+2="], "student": ["2", "5 x"]}
  sweep = language_figures.sweep(
    [("parsed", "parse rate")], [1.0, 2.0],
    {"parsed": np.array([[0.5, 0.6], [0.7, 0.8]])},
    x_label="scale", title="t", caption="c",
  )
  assert sweep.data == {
    "scale": [1.0, 1.0, 2.0, 2.0], "repetition": [0, 1, 0, 1],
    "parsed": [0.5, 0.6, 0.7, 0.8],
  }


def test_the_report_shows_the_spread(tmp_path):
  row = {"model": "opd", "steps": None, "metric": "answer", "n": 10}
  page = report.write_report(
    tmp_path,
    title="t",
    lead="l",
    summary={
      "scores": [
        {**row, "value": 0.5, "spread": 0.0625, "values": [0.4, 0.6]},
        {**row, "model": "base", "value": 0.25},
      ]
    },
    figures=[],
    command="c",
  ).read_text()
  assert '<td class="best">0.500 ± 0.062</td>' in page
  assert "<td>0.250</td>" in page
  assert report.metric_label("parsed") == "parse rate"
  assert report.metric_label("no_such") == "no_such"
  assert report.higher_is_better("trace")
  assert not report.higher_is_better("reverse_kl")


def test_repetitions_become_means_with_spread():
  """Three repetitions with known scores: mean, sample deviation, values."""
  config = config_lib.load(EXACT)

  class Problem:
    headline = "b"

    def score(self, model, teacher):
      assert teacher.replicate == model.replicate
      return {"a": 1.0, "b": float(model.replicate**2)}

  with config.unlocked():
    config.evaluation.models = ("scale_100",)
  job = language_job.Job(config, Problem(), [], {}, {})
  of = {
    name: [language.Model(name, None, None, i) for i in range(3)]
    for name in ("scale_100", "teacher")
  }
  rows = language_job._evaluate(job, of, lambda line: None)
  assert [r["metric"] for r in rows] == ["b", "a"]
  assert rows[0]["model"] == "reward scale 1"
  np.testing.assert_allclose(rows[0]["value"], 5 / 3)
  np.testing.assert_allclose(rows[0]["spread"], np.std([0, 1, 4], ddof=1))
  assert rows[0]["values"] == [0.0, 1.0, 4.0]
