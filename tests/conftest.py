import gc
import signal

import pytest
import torch
from support import interpreter


def pytest_configure(config):
    if interpreter.ON:
        interpreter.convert_bfloat16()
        interpreter.patch_the_language_once()
        # What kernels compute outside a tensor, and drop, may be 0 / 0; NumPy says so for every tile.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")


def pytest_make_parametrize_id(config, val):
    """The names of dtypes and of rows of tables, which pytest would number."""
    name = str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else getattr(val, "id", None)
    return name if isinstance(name, str) else None


def pytest_collection_modifyitems(items):
    """Tests that say that they take long come first, the longest at the head, so that none is left over at the end."""
    items.sort(key=lambda item: -max((mark.kwargs.get("seconds", 0) for mark in item.iter_markers("slow")), default=0))


def pytest_collection_finish():
    """Trainers and jobs collect garbage; what is there before the tests, all of torch and transformers, is none, and to
    look through it takes half a second each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # or extensions take it for leaks


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def heed_ctrl_c():
    """Background jobs of a shell start with SIGINT ignored; Python then has no handler that raises."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
