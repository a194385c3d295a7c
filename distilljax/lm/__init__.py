"""Language-model parts: alignment of tokenizers, rollouts, token masks."""

from distilljax.lm.alignment import (
    ChunkAlignment,
    align_chunks,
    pad_alignments,
    token_bytes,
    word_boundaries,
)

__all__ = [
    "ChunkAlignment",
    "align_chunks",
    "pad_alignments",
    "token_bytes",
    "word_boundaries",
]
