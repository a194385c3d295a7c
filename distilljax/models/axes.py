"""Names of the axes of parameters: what the sharding rules speak about.

A parameter is known by its path ("layers/0/mlp/up_proj/kernel"), so networks
stay plain nested dicts. The names:

* `embed`: the stream that blocks read and write;
* `mlp`, `heads`: what only the inside of a block sees;
* `vocab`: entries of a vocabulary.

An axis without a name is never cut. Names belong to the last axes of an array,
so that the matrices of a stack of layers [depth, ...] need no entry of their
own; its vectors have one, since a stack of vectors looks like a matrix.
"""

import re
from collections.abc import Sequence

AxisNames = tuple[str | None, ...]
# (pattern for the end of a path, names of the last axes); the first match wins.
AxisTable = Sequence[tuple[str, AxisNames]]

AXES: AxisTable = (
  # vectors of a stack of layers
  (r"blocks/\w+/bias", (None,)),
  (r"(input_layernorm|post_attention_layernorm|[qk]_norm)/weight", (None,)),
  # "transformer"
  (r"embed_tokens/weight", ("vocab", "embed")),
  (r"lm_head/kernel", ("embed", "vocab")),
  (r"self_attn/[qkv]_proj/kernel", ("embed", "heads")),
  (r"self_attn/o_proj/kernel", ("heads", "embed")),
  (r"mlp/(gate|up)_proj/kernel", ("embed", "mlp")),
  (r"mlp/down_proj/kernel", ("mlp", "embed")),
  # "dit"
  (r"qkv/kernel", ("embed", "heads")),
  (r"(block_\d+|blocks)/out/kernel", ("heads", "embed")),
  (r"mlp_in/kernel", ("embed", "mlp")),
  (r"mlp_out/kernel", ("mlp", "embed")),
  # "dit" and "unet"
  (r"modulation/kernel", ("embed", "mlp")),
  (r"(time|second)_in/kernel", ("embed", "mlp")),
  (r"(time|second)_out/kernel", ("mlp", "embed")),
  (r"label/table", (None, "embed")),
  (r"stem/kernel", (None, "embed")),
  (r"head/kernel", ("embed", None)),
  # "unet"
  (r"conv_in/kernel", ("embed", "mlp")),
  (r"conv_out/kernel", ("mlp", "embed")),
  (r"(skip|downsample_\d+|upsample_\d+)/kernel", (None, "embed")),
  # "mlp": every other layer is the inside of a block
  (r"hidden_0/kernel", (None, "embed")),
  (r"hidden_\d*[13579]/kernel", ("embed", "mlp")),
  (r"hidden_\d*[02468]/kernel", ("mlp", "embed")),
  # "head"
  (r"hidden/kernel", ("embed", "mlp")),
  (r"mix/kernel", ("mlp", "embed")),
)


def axis_names(
  path: str, ndim: int, table: AxisTable = ()
) -> AxisNames | None:
  """Names of a parameter's axes.

  Args:
    path: its path, keys joined by "/".
    ndim: number of its axes.
    table: entries that are looked at before those of the zoo.

  Returns:
    A name or None for every axis; None for a path in no table.

  Raises:
    ValueError: an entry names more axes than the array has.
  """
  for pattern, names in (*table, *AXES):
    if re.search(rf"(^|/){pattern}$", path):
      if len(names) > ndim:
        raise ValueError(
          f"axis_names: {path} must have at least the {len(names)} axes"
          f" {names} of its entry {pattern!r}, got {ndim}"
        )
      return (None,) * (ndim - len(names)) + tuple(names)
  return None
