import torch


def pytest_make_parametrize_id(config, val):
    """The names of dtypes, which pytest would number."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None
