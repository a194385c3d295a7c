"""Language-model parts: alignment of tokenizers, rollouts, token masks."""

from distilljax.lm.alignment import (
    ChunkAlignment,
    align_chunks,
    pad_alignments,
    token_bytes,
    word_boundaries,
)
from distilljax.lm.rollout import (
    Rollout,
    Step,
    generate,
    make_sampler,
    rollout_logits,
    sampling_logits,
)
from distilljax.lm.tokens import completion_logits, pad, token_log_probs

__all__ = [
    "ChunkAlignment",
    "Rollout",
    "Step",
    "align_chunks",
    "completion_logits",
    "generate",
    "make_sampler",
    "pad",
    "pad_alignments",
    "rollout_logits",
    "sampling_logits",
    "token_bytes",
    "token_log_probs",
    "word_boundaries",
]
