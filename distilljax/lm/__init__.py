"""Language-model parts: alignment of tokenizers, rollouts, token masks."""

from distilljax.lm.alignment import (
    ChunkAlignment,
    align_chunks,
    pad_alignments,
    token_bytes,
    word_boundaries,
)
from distilljax.lm.drift_stop import DriftState, drift_stop
from distilljax.lm.rollout import (
    Rollout,
    Step,
    generate,
    make_sampler,
    rollout_logits,
    sampling_logits,
)
from distilljax.lm.startup_check import (
    Settings,
    check_settings,
    tokenizer_fingerprint,
)
from distilljax.lm.tokens import completion_logits, pad, token_log_probs

__all__ = [
    "ChunkAlignment",
    "DriftState",
    "Rollout",
    "Settings",
    "Step",
    "align_chunks",
    "check_settings",
    "completion_logits",
    "drift_stop",
    "generate",
    "make_sampler",
    "pad",
    "pad_alignments",
    "rollout_logits",
    "sampling_logits",
    "token_bytes",
    "token_log_probs",
    "tokenizer_fingerprint",
    "word_boundaries",
]
