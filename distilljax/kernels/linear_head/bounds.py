"""What the gradient of a mean loss may take, recorded from compiles for chips.

`tests/kernels/linear_divergence_aot_test.py` compiles it ahead of time and
fails above a bound. One chunk of columns [n, chunk] in float32 is 128 MiB a
model at 4096 columns; plain losses hold 9 to 14 GiB at this shape. With a
reference there are 2048: at 2816 v6e's compiler took 0.384 GiB, not 0.3. On an
H100 there are always 2048: at 4096 its compiler took 0.531 GiB for forward_kl
and 0.750 for skew_reverse_kl, not 0.45 and 0.6. With a cached teacher there are
1024: at 4096 v5e's compiler took 0.647 GiB for the tail "bucket", whose gather
and scatter at ids keep copies of a chunk, not 0.3; sparse_reverse_kl has the
same passes. A tied head [v, d] takes what one [d, v] does: nothing is copied.
"""

# {chip: (most of a kind of one pass, most of one of two), GiB}.
GATES = {
  "v5e": (0.3, 0.45),
  "v5p": (0.3, 0.45),
  "v6e": (0.3, 0.45),
  "h100": (0.45, 0.6),
}

# n, v, d: rows, vocabulary, width of all models, bfloat16.
SHAPE = (8192, 151936, 4096)
# Tokens of a cached teacher.
TOP_K = 64

# {(chip, kind and form): bytes of temporaries} of value and gradient in the
# student's hidden states and head; heads themselves are 1.16 GiB each.
TEMPORARIES = {
  ("v5e", "forward_kl"): 269_601_792,
  ("v5e", "reverse_kl"): 269_731_840,
  ("v5e", "gopd"): 202_981_888,
  ("v5e", "gopd statistics"): 203_010_048,
  ("v5e", "generalized_jsd"): 404_205_056,
  ("v5e", "skew_forward_kl"): 404_172_800,
  ("v5e", "skew_reverse_kl"): 403_947_008,
  ("v5e", "total_variation"): 403_947_008,
  ("v5e", "forward_kl exact"): 403_881_984,
  ("v5e", "gopd exact"): 270_118_912,
  ("v5e", "sparse_forward_kl bucket"): 158_918_656,
  ("v5e", "sparse_forward_kl drop"): 141_461_504,
  ("v5e", "sparse_forward_kl renormalize"): 140_621_824,
  ("v5e", "forward_kl tied"): 269_601_792,
  ("v5p", "forward_kl"): 269_580_032,
  ("v5p", "reverse_kl"): 269_612_768,
  ("v5p", "gopd"): 270_103_968,
  ("v5p", "gopd statistics"): 270_201_888,
  ("v5p", "generalized_jsd"): 403_993_024,
  ("v5p", "skew_forward_kl"): 403_894_816,
  ("v5p", "skew_reverse_kl"): 403_993_024,
  ("v5p", "total_variation"): 403_993_024,
  ("v5p", "sparse_forward_kl bucket"): 282_553_024,
  ("v5p", "sparse_forward_kl drop"): 218_656_288,
  ("v5p", "sparse_forward_kl renormalize"): 176_320_416,
  ("v5p", "forward_kl tied"): 269_580_032,
  ("v6e", "forward_kl"): 269_580_064,
  ("v6e", "reverse_kl"): 269_645_600,
  ("v6e", "gopd"): 269_874_752,
  ("v6e", "gopd statistics"): 270_103_680,
  ("v6e", "generalized_jsd"): 404_320_448,
  ("v6e", "skew_forward_kl"): 404_320_448,
  ("v6e", "skew_reverse_kl"): 404_320_448,
  ("v6e", "total_variation"): 404_287_712,
  ("v6e", "sparse_forward_kl bucket"): 215_476_960,
  ("v6e", "sparse_forward_kl drop"): 150_467_680,
  ("v6e", "sparse_forward_kl renormalize"): 150_074_880,
  ("v6e", "forward_kl tied"): 269_580_064,
  ("h100", "forward_kl"): 352_565_104,
  ("h100", "reverse_kl"): 285_414_512,
  ("h100", "gopd"): 352_654_512,
  ("h100", "gopd statistics"): 470_235_088,
  ("h100", "generalized_jsd"): 419_771_264,
  ("h100", "skew_forward_kl"): 419_771_264,
  ("h100", "skew_reverse_kl"): 470_071_936,
  ("h100", "total_variation"): 285_553_520,
  ("h100", "forward_kl exact"): 285_382_512,
  ("h100", "gopd exact"): 352_655_512,
  ("h100", "sparse_forward_kl bucket"): 216_868_216,
  ("h100", "sparse_forward_kl drop"): 187_310_184,
  ("h100", "sparse_forward_kl renormalize"): 211_815_256,
  ("h100", "forward_kl tied"): 352_565_104,
}

# {chip: bytes of temporaries} of the value of forward_kl with
# implementation="pallas_tpu"; by chunks it is 269 MB on all of them.
KERNEL_TEMPORARIES = {"v5e": 0, "v5p": 4_227_040, "v6e": 0}
