"""What the kernels may take on each chip, recorded from compiles ahead of time.

`tests/kernels/attention_aot_test.py` compiles them and fails above a bound. At
head width 64 the compiler copies operands to widen their lanes to 128; on v5p
it keeps the rows of statistics in another layout than the kernel.
"""

# {chip: topology} for `jax.experimental.topologies`.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

# {(chip, kernel, n, width of a head): bytes of temporaries}, one batch row,
# four heads, bfloat16, with and without causal.
TEMPORARIES = {
    ("v5e", "forward", 4096, 128): 0,
    ("v5e", "fused", 4096, 128): 0,
    ("v5e", "tangent", 4096, 128): 0,
    ("v5e", "backward", 4096, 128): 0,
    ("v5e", "second_backward", 4096, 128): 0,
    ("v5e", "fused", 16384, 64): 33_812_480,
    ("v5e", "fused", 4096, 256): 0,
    ("v5p", "forward", 4096, 128): 98_272,
    ("v5p", "fused", 4096, 128): 131_008,
    ("v5p", "tangent", 4096, 128): 131_008,
    ("v5p", "backward", 4096, 128): 0,
    # The tangent of o in float32 stays in memory there.
    ("v5p", "second_backward", 4096, 128): 8_781_440,
    ("v6e", "forward", 4096, 128): 0,
    ("v6e", "fused", 4096, 128): 0,
    ("v6e", "tangent", 4096, 128): 0,
    ("v6e", "backward", 4096, 128): 0,
    ("v6e", "second_backward", 4096, 128): 0,
}

# {(chip, kernel): bundles of a step of 512x2048} at width 128 in bfloat16, as
# `benchmarks.kernel_schedule` prints them; four steps of 512x512 each.
BUNDLES = {
    ("v5e", "forward"): 4907,
    ("v5e", "fused"): 12282,
    ("v5e", "fused_q"): 9161,
    ("v5e", "tangent"): 9440,
    ("v5e", "backward_rows"): 5850,
    ("v5e", "backward_columns"): 7925,
    ("v5e", "second_rows"): 14284,
    ("v5e", "second_columns"): 15450,
    ("v5p", "forward"): 5107,
    ("v5p", "fused"): 12812,
    ("v5p", "fused_q"): 9254,
    ("v5p", "tangent"): 9538,
    ("v5p", "backward_rows"): 5851,
    ("v5p", "backward_columns"): 8040,
    ("v5p", "second_rows"): 14373,
    ("v5p", "second_columns"): 15858,
    ("v6e", "forward"): 3602,
    ("v6e", "fused"): 7663,
    ("v6e", "fused_q"): 6196,
    ("v6e", "tangent"): 6175,
    ("v6e", "backward_rows"): 3802,
    ("v6e", "backward_columns"): 4740,
    ("v6e", "second_rows"): 9112,
    ("v6e", "second_columns"): 10217,
}

# {chip: bytes of temporaries} of the gradient of MeanFlow's loss at n = 4096:
# six scanned and checkpointed layers of width 1024 with eight heads.
MEAN_FLOW = {"v5e": 51_238_912}
