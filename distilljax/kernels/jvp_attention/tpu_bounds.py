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
    ("v5e", "fused", 16384, 64): 17_035_264,
    ("v5e", "fused", 4096, 256): 0,
    ("v5p", "forward", 4096, 128): 98_272,
    ("v5p", "fused", 4096, 128): 131_008,
    ("v5p", "tangent", 4096, 128): 131_008,
    ("v5p", "backward", 4096, 128): 0,
    ("v6e", "forward", 4096, 128): 0,
    ("v6e", "fused", 4096, 128): 0,
    ("v6e", "tangent", 4096, 128): 0,
    ("v6e", "backward", 4096, 128): 0,
}

# {chip: bytes of temporaries} of the gradient of MeanFlow's loss at n = 4096:
# six scanned and checkpointed layers of width 1024 with eight heads.
MEAN_FLOW = {"v5e": 51_238_912}
