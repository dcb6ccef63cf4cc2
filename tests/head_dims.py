"""(head_dim_qk, head_dim_vo) that Hopper's prefill kernels are tested with."""

COMPILED_DIMS = [(64, 64), (128, 128), (256, 256)]
# Every other kind: compiled, padded to each of those that are, alike or not.
OTHER_DIMS = [
    (192, 128),
    (96, 96),
    (80, 80),
    (112, 112),
    (40, 64),
    (72, 96),
    (120, 40),
    (136, 104),
    (192, 192),
    (64, 200),
]
