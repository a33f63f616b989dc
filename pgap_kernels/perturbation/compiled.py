"""What has to be known of ``torch.compile`` while a model's forward runs on other weights."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable

import torch
from torch import nn


def uncompiled() -> contextlib.AbstractContextManager:
    """Run compiled functions as the Python code that they were made from."""
    return torch.compiler.set_stance("force_eager")


def is_called_compiled() -> bool:
    """Whether the forward was called by a compiled function, even if ``uncompiled`` makes it run as Python code."""
    codes = (frame.f_code for frame, _ in traceback.walk_stack(None))
    file = torch._dynamo.eval_frame.__file__
    return any(code.co_name == "compile_wrapper" and code.co_filename == file for code in codes)


def is_any_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether any of some modules are compiled."""
    return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in modules)
