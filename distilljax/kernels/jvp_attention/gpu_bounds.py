"""What the kernels may take on an H100, recorded from compiles ahead of time.

`tests/kernels/attention_h100_test.py` compiles them and fails above a bound, or
if anything spills. None of them was ever run there: how fast they are is not
known.
"""

# Rows and columns of what is compiled: one batch row, four heads, bfloat16.
LENGTH = 4096

# {(kernel, width of a head): registers of a thread}, causal or not; the most
# that there are is 255. All use tensor cores.
REGISTERS = {
    ("forward", 64): 201,
    ("fused", 64): 234,
    ("tangent", 64): 182,
    ("backward_rows", 64): 128,
    ("backward_columns", 64): 168,
    ("second_statistics", 64): 182,
    ("second_rows", 64): 191,
    ("second_columns", 64): 174,
    ("forward", 128): 168,
    ("fused", 128): 255,
    ("tangent", 128): 213,
    ("backward_rows", 128): 160,
    ("backward_columns", 128): 248,
    ("second_statistics", 128): 217,
    ("second_rows", 128): 174,
    ("second_columns", 128): 252,
    ("forward", 256): 233,
    ("fused", 256): 215,
    ("tangent", 256): 208,
    ("backward_rows", 256): 145,
    ("backward_columns", 256): 169,
    ("second_statistics", 256): 206,
    ("second_rows", 256): 167,
    ("second_columns", 256): 172,
}

# {(function, width of a head): bytes of temporaries}. With tangents the mean of
# the values, 4 heads in bfloat16; backwards one statistic of the rows, 4 heads
# x 4096 in float32, and three for the second order.
TEMPORARIES = {
    ("forward", 64): 0,
    ("fused", 64): 512,
    ("tangent", 64): 512,
    ("backward", 64): 65_552,
    ("second_backward", 64): 196_880,
    ("forward", 128): 0,
    ("fused", 128): 1024,
    ("tangent", 128): 1024,
    ("backward", 128): 65_552,
    ("second_backward", 128): 196_880,
    ("forward", 256): 0,
    ("fused", 256): 2048,
    ("tangent", 256): 2048,
    ("backward", 256): 65_552,
    ("second_backward", 256): 196_880,
}

# Bytes of temporaries of the gradient of MeanFlow's loss at n = 4096: six
# scanned and checkpointed layers of width 1024 with eight heads.
MEAN_FLOW = 153_093_944
