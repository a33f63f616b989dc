"""A copy of weights kept in a file, so that holding it costs no memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch


class Snapshot:
    """The values of ``parameters`` now, in a nameless temporary file in ``folder`` that ends with this object."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], folder: Path) -> None:
        self._parameters = list(parameters)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  open as long as this object
        for parameter in self._parameters:
            # As bytes, since numpy has no bfloat16.
            parameter.detach().cpu().flatten().view(torch.uint8).numpy().tofile(self._file)

    def restore(self) -> None:
        """Write the values back."""
        self._file.seek(0)
        for parameter in self._parameters:
            size = parameter.numel() * parameter.element_size()
            values = torch.from_numpy(np.fromfile(self._file, np.uint8, size)).view(parameter.dtype)
            parameter.data.copy_(values.view(parameter.shape))
