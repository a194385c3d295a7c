"""Prune-OPD: drift monitors, events and weights."""

import functools

import jax

from distilljax import losses

CALLS = {
  r"overlap_ratio_\d+_overlap_ratio": "topk_overlap",
  r"teacher_top_p_accept_\d+_teacher_top_p_accept": "teacher_top_p_accept",
  r"\w+_\d+_bad_event": "drift_events",
  r"\w+_\d+_(weights|loss_weights|effective_response_length)": (
    "drift_weights"
  ),
  r"\w+_\d+_weighted_scores": "scores x drift_weights(...).loss_weights",
}
NOT_REPRODUCED = {
  r"overlap_mask": "whether each id is shared: topk_overlap is its mean",
}


@functools.partial(jax.jit, static_argnames="metric")
def _weights(arrays, where, threshold, drop, base, *, metric):
  student_ids, teacher_ids, teacher_lp, responses, scores = arrays
  if metric == "overlap_ratio":
    monitor = losses.topk_overlap(student_ids, teacher_ids)
    bar = threshold
  else:
    monitor = losses.teacher_top_p_accept(
      responses, teacher_ids, teacher_lp, threshold=threshold
    )
    bar = 0.5  # the monitor is 0 or 1
  monitor = monitor.astype(scores.dtype)
  events = losses.drift_events(monitor, where, threshold=bar)
  drift = losses.drift_weights(events, where, drop=drop, base=base)
  return {
    metric: monitor,
    "bad_event": events.astype(scores.dtype),
    "weights": drift.weights,
    "loss_weights": drift.loss_weights,
    "effective_response_length": drift.effective_length.astype(scores.dtype),
    "weighted_scores": scores * drift.loss_weights[..., None],
  }


def reproduce(golden):
  """The keys of CALLS."""
  arrays = tuple(
    golden[k]
    for k in (
      "student_topk_ids",
      "teacher_topk_ids",
      "teacher_topk_lp",
      "responses",
      "scores",
    )
  )
  where = golden["response_mask"] > 0
  out = {}
  for i, (threshold, drop, base) in enumerate(golden["threshold_wdrop_wbase"]):
    for metric in ("overlap_ratio", "teacher_top_p_accept"):
      values = _weights(arrays, where, threshold, drop, base, metric=metric)
      out |= {f"{metric}_{i}_{k}": v for k, v in values.items()}
  return {k: v for k, v in out.items() if k in golden}
