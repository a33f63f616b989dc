"""Builds the C++ extension pgap_kernels/_C.abi3.so where it can; the package works, slowly, without it.

pip install --no-build-isolation .                       uses the installed torch; extension if it compiles
PGAP_FORCE_BUILD=1 pip install --no-build-isolation .    a failed build is an error
"""

import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FORCE = os.environ.get("PGAP_FORCE_BUILD", "0") not in ("", "0")

# Each instruction set has its own translation unit, which names its compiler flags; dispatch.cpp picks one at run time.
X86, ARM = ["isa_avx2", "isa_avx512", "isa_avx512_bf16"], ["isa_neon"]
ISAS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}.get(platform.machine().lower(), [])
FAMILIES = ["dense", "masked", "preconditioned", "anchor", "reduction", "lowrank", "forward"]
SOURCES = ["ops", *(f"ops_{family}" for family in FAMILIES), "dispatch", "isa_generic", *ISAS]


def flags_of(source):
    return " ".join(re.findall(r"^// flags: (.*)$", Path(source).read_text(encoding="utf-8"), re.MULTILINE)).split()


def not_built(reason, error=None):
    """A build without the extension: an error if PGAP_FORCE_BUILD=1, else a warning."""
    if FORCE:
        raise SystemExit(f"pgap_kernels: PGAP_FORCE_BUILD=1 and the extension was not built: {reason}") from error
    sys.stderr.write(
        f"pgap_kernels: warning: the C++ extension was not built ({reason}). The package will run on its plain-PyTorch "
        "reference, which is slow. PGAP_FORCE_BUILD=1 turns this into an error.\n"
    )


def extensions():
    """The extension, or nothing (hence a pure-Python package) where there is no torch to build against."""
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        not_built(
            "torch is not installed where the build runs. Install it first, then build against it: "
            "`pip install torch` and `pip install --no-build-isolation .`",
            error,
        )
        return []
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 10):
        not_built(f"torch {torch.__version__} is too old: the stable ABI starts at 2.10")
        return []
    return [
        Extension(
            "pgap_kernels._C",
            [f"csrc/{name}.cpp" for name in SOURCES],
            depends=[*map(str, sorted(Path("csrc").glob("*.[hi]*"))), "setup.py"],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch", "torch_cpu", "c10"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030b0000")],
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-fno-math-errno",
            ],
            py_limited_api=True,
        )
    ]


class BuildCpuKernels(build_ext):
    """Compiles each source with its own flags, as many at a time as there are processors; a failure is a warning unless
    PGAP_FORCE_BUILD=1."""

    def run(self):
        try:
            super().run()
        except Exception as error:
            not_built(f"the compiler failed: {error}", error)
            self.extensions = []

    def build_extension(self, ext):
        compile_all, compile_one = self.compiler.compile, self.compiler._compile

        def compile_in_parallel(*args, **kwargs):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = []

                def begin(obj, src, ext_name, cc_args, extra, pp_opts):
                    flags = [*extra, *flags_of(src)]
                    jobs.append(pool.submit(compile_one, obj, src, ext_name, cc_args, flags, pp_opts))

                self.compiler._compile = begin
                objects = compile_all(*args, **kwargs)
                for job in jobs:
                    job.result()
            return objects

        self.compiler.compile = compile_in_parallel
        super().build_extension(ext)

    def get_ext_filename(self, name):
        return str(Path(*name.split("."))) + ".abi3.so"


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCpuKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
