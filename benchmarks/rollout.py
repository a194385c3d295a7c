"""Tokens a second of the sampler, beside the same model without a cache.

python -m benchmarks.rollout [task ...] [--rounds N] [--json FILE]

Sides, run in turn in one process on equal weights and prompts:

* ours: `lm.make_sampler`, its cache grown in four parts;
* no_cache: a jitted loop that reads the whole sequence again for every token;
* tunix: the sampler of google-tunix with its own Qwen3, where it is installed.

All sample at temperature 1 and return the tokens' log-probabilities; no row
ends early. Before anything is timed, the greedy tokens of all sides are
compared. The ratio is that of the median wall times of a call.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import lm, models


class Size(NamedTuple):
  """A model and a batch."""

  width: int
  depth: int
  vocab: int
  prompts: int
  samples: int
  prompt_length: int
  new_tokens: int


TASKS = {
    "d64": Size(64, 2, 32, 64, 1, 16, 32),
    "d128": Size(128, 4, 32, 64, 1, 16, 64),
    "d128_small_batch": Size(128, 4, 32, 8, 1, 16, 64),
    "d64_group": Size(64, 2, 32, 8, 8, 64, 32),
    "d128_vocab4k": Size(128, 4, 4096, 16, 1, 16, 64),
}
HEADS, KV_HEADS = 4, 2
CACHE_PARTS = 4  # of ours
TUNIX_GOAL = 3.0


def no_cache(apply_fn, new_tokens: int, greedy: bool) -> Callable[..., Any]:
  """sample(params, prompts [n, p], key) -> (tokens [n, t], log-probs)."""

  @jax.jit
  def sample(params, prompts, key):
    n, p = prompts.shape
    buffer = jnp.pad(prompts, ((0, 0), (0, new_tokens)))

    def step(i, carry):
      buffer, log_probs = carry
      logits = apply_fn(params, buffer)
      logits = jax.lax.dynamic_slice_in_dim(logits, p + i - 1, 1, axis=1)[:, 0]
      if greedy:
        token = jnp.argmax(logits, axis=-1)
      else:
        token = jax.random.categorical(jax.random.fold_in(key, i), logits)
      picked = lm.token_log_probs(logits, token)
      put = jax.lax.dynamic_update_slice
      return (
          put(buffer, token[:, None].astype(buffer.dtype), (0, p + i)),
          put(log_probs, picked[:, None], (0, i)),
      )

    first = (buffer, jnp.zeros((n, new_tokens)))
    buffer, log_probs = jax.lax.fori_loop(0, new_tokens, step, first)
    return buffer[:, p:], log_probs

  return sample


class _Numbers:
  """A "tokenizer" of texts like "3 17 5"."""

  def __init__(self, vocab: int):
    self.vocab = vocab

  def encode(self, text, **_):
    return [int(x) for x in text.split()]

  def decode(self, ids, **_):
    return " ".join(map(str, ids))

  def bos_id(self):
    return None

  # Outside the vocabulary: no row ends, and nothing sampled is padding.
  def eos_id(self):
    return self.vocab

  def pad_id(self):
    return self.vocab + 1


def tunix(params, size: Size) -> Any:
  """Tunix's sampler on its own Qwen3 with the given weights."""
  from flax import nnx
  from tunix.generate import sampler as tunix_sampler
  from tunix.models.qwen3 import model as qwen3

  head_dim = size.width // HEADS
  model = qwen3.Qwen3(
      qwen3.ModelConfig(
          num_layers=size.depth,
          vocab_size=size.vocab,
          embed_dim=size.width,
          hidden_dim=3 * size.width,
          num_heads=HEADS,
          head_dim=head_dim,
          num_kv_heads=KV_HEADS,
          rope_theta=1_000_000,
          norm_eps=1e-6,
          use_tied_embedding=True,
      ),
      rngs=nnx.Rngs(0),
  )

  def put(variable, value):
    assert variable[...].shape == value.shape
    variable[...] = value

  put(model.embedder.input_embedding, params["embed_tokens"]["weight"])
  put(model.final_norm.w, params["norm"]["weight"])
  for i, block in enumerate(model.layers):
    ours = params["layers"][str(i)]
    for name in ("input_layernorm", "post_attention_layernorm"):
      put(getattr(block, name).w, ours[name]["weight"])
    attention = ours["self_attn"]
    for name in ("q_norm", "k_norm"):
      put(getattr(block.attn, name).w, attention[name]["weight"])
    for name in ("q_proj", "k_proj", "v_proj"):
      kernel = attention[name]["kernel"]
      put(
          getattr(block.attn, name).w,
          kernel.reshape(size.width, -1, head_dim),
      )
    kernel = attention["o_proj"]["kernel"]
    put(block.attn.o_proj.w, kernel.reshape(HEADS, head_dim, size.width))
    for name in ("gate_proj", "up_proj", "down_proj"):
      put(getattr(block.mlp, name).kernel, ours["mlp"][name]["kernel"])
  return tunix_sampler.Sampler(
      model,
      _Numbers(size.vocab),
      tunix_sampler.CacheConfig(
          cache_size=size.prompt_length + size.new_tokens,
          num_layers=size.depth,
          num_kv_heads=KV_HEADS,
          head_dim=head_dim,
      ),
  )


def _sides(net, size: Size, greedy: bool) -> dict[str, Callable[[], Any]]:
  """Calls that return the tokens [n, t], ready on the host."""
  rng = np.random.default_rng(0)
  prompts = rng.integers(size.vocab, size=(size.prompts, size.prompt_length))
  prompts = prompts.astype(np.int32)
  repeated = np.repeat(prompts, size.samples, axis=0)
  sample = lm.make_sampler(
      net.apply_fn,
      max_new_tokens=size.new_tokens,
      eos_id=None,
      num_samples=size.samples,
      temperature=0 if greedy else 1.0,
      cache_parts=CACHE_PARTS,
  )
  keys = jax.random.split(jax.random.key(1), size.prompts)
  again = no_cache(net.apply_fn, size.new_tokens, greedy)

  def ours():
    out = sample(net.params, prompts, keys)
    return np.asarray(out.tokens), np.asarray(out.log_probs)

  def slow():
    out = again(net.params, jnp.asarray(repeated), jax.random.key(1))
    return tuple(map(np.asarray, out))

  sides = {"ours": ours, "no_cache": slow}
  if importlib.util.find_spec("tunix"):
    sampler = tunix(net.params, size)
    texts = [" ".join(map(str, row)) for row in repeated.tolist()]

    def theirs():
      out = sampler(
          texts,
          max_generation_steps=size.new_tokens,
          max_prompt_length=size.prompt_length,
          temperature=0.0 if greedy else 1.0,
          top_p=None if greedy else 1.0,
          return_logprobs=True,
          seed=1,
      )
      return np.stack(out.tokens), np.asarray(out.logprobs)

    sides["tunix"] = theirs
  return sides


def compare(task: str, rounds: int) -> dict[str, Any]:
  """Checks the greedy tokens of a task, then times its sides in turn."""
  size = TASKS[task]
  net = models.make(
      "transformer",
      jax.random.key(0),
      vocab_size=size.vocab,
      width=size.width,
      depth=size.depth,
      heads=HEADS,
      kv_heads=KV_HEADS,
      rope_base=1e6,
  )
  greedy = {k: run()[0] for k, run in _sides(net, size, True).items()}
  # Rounding may flip a near tie, after which the whole row is another one.
  same = {
      k: float(np.mean(np.all(tokens == greedy["ours"], axis=1)))
      for k, tokens in greedy.items()
  }
  sides = _sides(net, size, False)
  compiled, wall = {}, {k: [] for k in sides}
  for name, run in sides.items():
    start = time.perf_counter()
    run()
    compiled[name] = time.perf_counter() - start
  for i in range(rounds + 1):
    for name in list(sides) if i % 2 else list(reversed(sides)):
      start = time.perf_counter()
      sides[name]()
      if i:
        wall[name].append(time.perf_counter() - start)
  tokens = size.prompts * size.samples * size.new_tokens
  median = {k: statistics.median(w) for k, w in wall.items()}
  return {
      "task": task,
      **size._asdict(),
      "rounds": rounds,
      "tokens_per_s": {k: tokens / m for k, m in median.items()},
      "best_tokens_per_s": {k: tokens / min(w) for k, w in wall.items()},
      "ratio": {k: m / median["ours"] for k, m in median.items()},
      "same_greedy_rows": same,
      "first_call_s": compiled,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("task", nargs="*", help=", ".join(TASKS))
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--json", help="file for the table")
  args = parser.parse_args()
  print(f"{jax.devices()[0].platform}, jax {jax.__version__}; tokens a second")
  rows = []
  for task in args.task or TASKS:
    row = compare(task, args.rounds)
    rows.append(row)
    for side, rate in row["tokens_per_s"].items():
      goal = f"  goal {TUNIX_GOAL:.1f}" if side == "tunix" else ""
      print(
          f"{task:18s} {side:9s} {rate:10.0f}  best"
          f" {row['best_tokens_per_s'][side]:10.0f}  its time / ours"
          f" {row['ratio'][side]:6.2f}{goal}  same greedy rows"
          f" {row['same_greedy_rows'][side]:.2f}  first call"
          f" {row['first_call_s'][side]:.1f} s",
          flush=True,
      )
  if not importlib.util.find_spec("tunix"):
    print("google-tunix is not installed: not compared")
  if args.json:
    with open(args.json, "w", encoding="utf-8") as f:
      json.dump({"jax": jax.__version__, "rows": rows}, f, indent=2)


if __name__ == "__main__":
  main()
