"""What methods of language models share: rollouts, logits of completions.

Their batches hold `prompts` [n, p], padded on the left, with `prompt_where`
where there is padding, and completions `tokens` [n, t] with `where` [n, t],
padded on the right.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distilljax import _checks, kernels, lm, losses, train
from distilljax.typing import Array, Params

# Which entries of a method's DEFAULTS are the sampler's.
SAMPLER = ("max_new_tokens", "eos_id", "pad_id", "top_k", "top_p")


def completion_logits(
  apply_fn: Callable[..., Any],
  params: Params,
  batch: Mapping[str, Array],
  **options: Any,
) -> Any:
  """Logits [n, t, v] that predict a batch's `tokens`."""
  return lm.completion_logits(
    apply_fn,
    params,
    batch["prompts"],
    batch["tokens"],
    prompt_where=batch.get("prompt_where"),
    where=batch["where"],
    **options,
  )


def implementation_of(
  slug: str,
  h: Mapping[str, Any],
  apply_fns: Mapping[str, Callable[..., Any]],
  needs_logits: str | None = None,
) -> str:
  """"fused" or "plain", which `divergence` takes.

  Args:
    slug: of the method.
    h: hyper-parameters: `loss_implementation`, None for fused where it can be.
    apply_fns: the networks of the loss; fused needs that each has a
      `linear_head`, as the functions of the zoo's "transformer" do.
    needs_logits: a setting that is plain only.
  """
  name, given = "loss_implementation", h["loss_implementation"]
  if given is not None:
    _checks.one_of(slug, name, given, ("fused", "plain"))
  bare = [k for k, f in apply_fns.items() if not hasattr(f, "linear_head")]
  why = needs_logits or (f"{bare[0]} has no linear_head" if bare else None)
  if given == "fused" and why:
    _checks.fail(slug, name, f"'plain' or None ({why})", "'fused'")
  return given or ("plain" if why else "fused")


def _vocabulary_axis(head: kernels.Head) -> str | None:
  """Mesh axis that the step's rules cut vocabularies over, if it divides it."""
  size = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
  return "tensor" if size > 1 and head.vocabulary % size == 0 else None


def divergence(
  implementation: str,
  apply_fns: Mapping[str, Callable[..., Any]],
  params: Mapping[str, Params],
  batch: Mapping[str, Array],
  *,
  kind: str,
  logged: str,
  **options: Any,
) -> tuple[Array, dict[str, train.Mean]]:
  """A divergence of every token of a batch, and what is logged beside it.

  Args:
    implementation: "plain" makes all logits; "fused" goes from hidden states
      through `kernels.linear_token_statistics`, which gives the same numbers
      and never holds them.
    apply_fns: student, teacher and, for "gopd", reference.
    params: of these by name.
    batch: as in the module.
    kind: "forward_kl", "generalized_jsd" or "gopd".
    logged: "reverse_kl" or "forward_kl", logged at temperature 1.
    **options: of the divergence.

  Returns:
    (nats [n, t], `Mean`s by name as of `student_metrics`).
  """
  where = batch["where"]
  if implementation == "plain":
    ours, *theirs = (
      completion_logits(f, params[k], batch) for k, f in apply_fns.items()
    )
    function = getattr(losses, "gopd_loss" if kind == "gopd" else kind)
    if kind == "gopd" and len(theirs) == 1:
      theirs.append(None)
    values = function(ours, *theirs, **options)
    return values, student_metrics(ours, theirs[0], where, direction=logged)

  def seen(name):
    head = apply_fns[name].linear_head(params[name])
    _, hidden = completion_logits(
      apply_fns[name], params[name], batch, features=True
    )
    # Features are float32; in the head's dtype, which they came from, the
    # products are as fast as the network's own.
    hidden = hidden.astype(head.kernel.dtype)
    return hidden.reshape(-1, hidden.shape[-1]), head

  if "reference" in apply_fns:
    options["reference"] = seen("reference")
  hidden, head = seen("student")
  found = kernels.linear_token_statistics(
    hidden,
    head,
    seen("teacher"),
    kind=kind,
    axis_name=_vocabulary_axis(head),
    **options,
  )
  shaped = lambda a: a.reshape(where.shape)
  return shaped(found.loss), _metrics(
    where,
    entropy=shaped(found.student_entropy),
    **{logged: shaped(getattr(found, logged))},
  )


def prompt_rows(batch: Mapping[str, Array]) -> dict[str, Array]:
  """The prompts of a batch, with their mask if there is one."""
  return {k: batch[k] for k in ("prompts", "prompt_where") if k in batch}


def make_rollouts(
  apply_fn: Callable[..., Any],
  h: Mapping[str, Any],
  *,
  num_samples: int = 1,
  name: str = "rollout",
) -> Callable[..., dict[str, Array]]:
  """Samples completions of a batch's prompts, for `collect`.

  Args:
    apply_fn: of the network that samples.
    h: hyper-parameters: those of `SAMPLER` and `sampling_temperature`.
    num_samples: completions of each prompt.
    name: of the draw.

  Returns:
    rollouts(params, batch, key) -> rows, num_samples a prompt side by side:
    the prompts, `tokens`, `where`, `log_probs` (at temperature 1) and
    `sampling_log_probs`, placed as the batch's prompts are.
  """
  options = {k: h[k] for k in SAMPLER}

  @jax.jit
  def program(params, prompts, prompt_where, key):
    keys = train.row_keys(train.named_key(key, name), prompts.shape[0])
    made = lm.generate(
      apply_fn,
      params,
      prompts,
      keys,
      prompt_where=prompt_where,
      num_samples=num_samples,
      temperature=h["sampling_temperature"],
      **options,
    )
    rows = {
      k: getattr(made, k)
      for k in ("prompts", "tokens", "where", "log_probs", "sampling_log_probs")
    }
    if prompt_where is not None:
      rows["prompt_where"] = made.prompt_where
    return rows

  def rollouts(params, batch, key):
    prompts = batch["prompts"]
    rows = program(params, prompts, batch.get("prompt_where"), key)
    placed = getattr(prompts, "sharding", None)
    return rows if placed is None else jax.device_put(rows, placed)

  return rollouts


def make_sample(
  apply_fn: Callable[..., Any], h: Mapping[str, Any]
) -> Callable[..., lm.Rollout]:
  """A method's `sample`: completions of inputs["prompts"] by the student.

  `steps` is the number of tokens at most, and inputs may hold `prompt_where`.
  """
  options = {k: h[k] for k in SAMPLER if k != "max_new_tokens"}

  def sample(params, inputs, key, *, steps):
    prompts = inputs["prompts"]
    return lm.make_sampler(
      apply_fn,
      max_new_tokens=steps,
      temperature=h["sampling_temperature"],
      **options,
    )(
      params["student"],
      prompts,
      train.row_keys(key, prompts.shape[0]),
      prompt_where=inputs.get("prompt_where"),
    )

  return sample


def fit(batch: Mapping[str, Array], length: int, pad_id: int) -> dict[str, Any]:
  """Prompts and completions of data, padded on the right to `length`.

  One shape for data and rollouts is one compiled step for both.
  """
  tokens, where = batch["tokens"], batch["where"]
  short = length - tokens.shape[1]
  if short > 0:
    wide = ((0, 0), (0, short))
    placed = getattr(tokens, "sharding", None)
    tokens = jnp.pad(jnp.asarray(tokens), wide, constant_values=pad_id)
    where = jnp.pad(jnp.asarray(where), wide)
    if placed is not None:
      tokens, where = jax.device_put((tokens, where), placed)
  return {**prompt_rows(batch), "tokens": tokens, "where": where}


def behaviour(
  batch: Mapping[str, Array], cap: float
) -> tuple[Array, Array]:
  """A rollout's own log-probabilities, and weights for how it was drawn.

  Args:
    batch: with `log_probs` (the behaviour snapshot at temperature 1),
      `sampling_log_probs` (what drew the tokens) and `where`.
    cap: most that a token weighs.

  Returns:
    (log-probabilities [n, t], importance weights [n, t]), without gradient.
  """
  old = jax.lax.stop_gradient(batch["log_probs"])
  weights = losses.truncated_importance_weights(
    old, batch["sampling_log_probs"], batch["where"], cap=cap
  )
  return old, weights


def student_metrics(
  student_logits: Array,
  teacher_logits: Array | None,
  where: Array,
  *,
  direction: str = "reverse_kl",
) -> dict[str, train.Mean]:
  """What is logged beside a loss: KL at temperature 1, entropy, length.

  Args:
    student_logits: Shape [n, t, v].
    teacher_logits: of the same positions; None logs no KL. Shape [n, t, v].
    where: tokens of the completions. Shape [n, t].
    direction: "reverse_kl" or "forward_kl", nats a token.

  Returns:
    `Mean`s by name.
  """
  values = {"entropy": losses.entropy(student_logits)}
  if teacher_logits is not None:
    values[direction] = getattr(losses, direction)(
      student_logits, teacher_logits
    )
  return _metrics(where, **values)


def _metrics(where, **values):
  """Means over tokens, and the mean length of a completion."""
  return {
    "length": train.mean(jnp.sum(where, axis=1, dtype=jnp.float32)),
    **{k: train.mean(v, where) for k, v in values.items()},
  }
