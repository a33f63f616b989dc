"""Which kernels the tests of compiled code have ``tools.compiled`` compile."""

FAMILIES = ["dense", "preconditioned", "anchor", "reduce", "low rank", "factor product", "forward"]
FLOAT32 = ["assemble", "guard"]  # kernels of float32 alone
# One configuration of each family.
SAMPLE = [
    *["--dtype", "bf16", "--target", "sm_90"],
    *["--config", "J=1", "momentum", "", "dot", "drawn core", "drawn factors", "mix"],
]
