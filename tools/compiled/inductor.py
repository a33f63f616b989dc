"""The Triton kernel that torch.compile makes of MeZO's perturbation, taken from inductor without a GPU.

    python -m tools.compiled.inductor [--dtype bf16]                 print its source

While it generates code, inductor asks the device for nothing but its properties; it is told those of an H100. It gets
the graph of ``w.add_(torch.randn_like(w) * eps)`` as the compiler's front end would leave it, writes its source and is
stopped before it would compile and load it. This leans on internals of the pinned torch and may fail with another.

MeZO's own call is ``torch.normal``, which inductor 2.13 does not fuse: an ATen kernel writes the noise and another pass
reads it. What is measured is the form that it does fuse.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import re
import tempfile
import types
from pathlib import Path
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

H100 = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=50 << 20,
)
ANSWERS = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.get_device_capability": lambda device=None: (H100.major, H100.minor),
    "torch.cuda.get_device_properties": lambda device=None: H100,
    "torch.cuda._get_device_properties": lambda device: H100,
    "torch.cuda._lazy_init": lambda: None,
    "torch.cuda._exchange_device": lambda device: 0,
    "torch.cuda._maybe_exchange_device": lambda device: 0,
    "torch.cuda.synchronize": lambda device=None: None,
    "torch.cuda.get_rng_state": lambda: torch.empty(0),
    "torch.cuda.set_rng_state": lambda state: None,
    "torch.utils._triton.triton_hash_with_backend": lambda: "",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def perturb(w: torch.Tensor) -> torch.Tensor:
    """What MeZO adds: noise in the dtype of the weights."""
    return w + torch.randn_like(w) * 1e-3


def generated(dtype: str, shape: tuple[int, int] = (4096, 4096)) -> str:
    """Everything inductor writes for the pass over one weight."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.replace_random import replace_random_passes
    from torch._inductor.utils import get_code
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = FakeTensorMode()
    with contextlib.ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch(name, answer, create=True))
        # The graph has its shapes already, and working them out again would call into CUDA.
        stack.enter_context(mock.patch("torch._inductor.compile_fx.fake_tensor_prop", lambda *_, **__: mode))
        stack.enter_context(torch._inductor.config.patch(force_disable_caches=True))
        stack.enter_context(V.set_fake_mode(mode))
        with mode:
            w = torch.empty(shape, device="cuda:0", dtype=DTYPES[dtype])
            graph = make_fx(perturb, decomposition_table=select_decomp_table())(w)
            replace_random_passes(graph)
            _write_in_place(graph, w)
        return "\n".join(get_code(lambda: compile_fx_inner(graph, [w])))


def _write_in_place(graph: torch.fx.GraphModule, w: torch.Tensor) -> None:
    """Let the result go to the first argument, as the front end does with ``add_``."""
    nodes = list(graph.graph.nodes)
    output = nodes[-1]
    with graph.graph.inserting_before(output):
        copy = graph.graph.call_function(torch.ops.aten.copy_.default, (nodes[0], output.args[0]))
    copy.meta["val"] = w
    output.args = ((),)
    graph.recompile()


def kernel_source(dtype: str) -> str:
    """The one kernel in it, with its imports, without what launches it."""
    kernels = re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", generated(dtype), re.S)
    if len(kernels) != 1:
        raise RuntimeError(f"inductor wrote {len(kernels)} kernels for the perturbation, not one")
    head, body = kernels[0].split("@triton_heuristics", 1)
    imports = [line for line in head.splitlines() if line.startswith(("import", "from"))]
    return "\n".join(imports) + "\n\n\n@triton.jit" + body.split("@triton.jit", 1)[1]


@functools.cache
def kernel(dtype: str) -> triton.JITFunction:
    """The kernel itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inductor_kernel.py"
        path.write_text(kernel_source(dtype))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # Triton reads the file when it decorates.
        return next(x for x in vars(module).values() if isinstance(x, triton.JITFunction))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the weights; default %(default)s")
    print(kernel_source(parser.parse_args().dtype))


if __name__ == "__main__":
    main()
