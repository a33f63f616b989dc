"""Triton's interpreter, which runs the Triton kernels on CPU tensors where TRITON_INTERPRET is 1."""

import os

import numpy as np

ON = os.environ.get("TRITON_INTERPRET") == "1"


def convert_bfloat16() -> None:
    """bfloat16 to float32 and back as every compiler does it. The interpreter's own conversion loses bits of subnormal
    numbers on the way up and does not round on the way down (Triton 3.9.0); test_triton_rounding.py looks."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.asarray(data).view(np.uint16).astype(np.uint32) << np.uint32(16)
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.asarray(data).view(np.uint32)
            up = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
            nan = (bits & np.uint32(0x7FFFFFFF)) > 0x7F800000
            return np.where(nan, 0x7FC0, up).astype(np.uint16)
        return original(data, source, target, rounding_mode)

    interpreter._convert_float = convert


def patch_the_language_once() -> None:
    """Once a launch for each module of kernels, and not again at every call of a device function, for which Triton 3.9
    looks through the whole language each time: a third of what interpreting takes."""
    from triton.runtime import interpreter

    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def patch(fn):
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(fn.__globals__))
        return patch_lang(fn)

    def call(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, call
