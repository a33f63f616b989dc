"""Which kernels the tests of compiled code have ``tools.compiled`` compile."""

FAMILIES = ["dense", "preconditioned", "anchor", "reduce", "low rank", "factor product", "forward"]
FLOAT32 = ["assemble", "guard"]  # kernels of float32 alone
CONFIGS = ["J=1", "momentum", "", "dot", "drawn core", "drawn factors", "mix"]  # one or two of each family
SAMPLE = ["--dtype", "bf16", "--config", *CONFIGS]
