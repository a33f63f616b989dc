"""Fine-tune a causal language model on two-label text without a backward pass, and measure what a step costs.

`run` is the whole job; ``pgap-kernels finetune`` is its command line. `Config` holds the options and `UserError` is
raised for anything the user can put right. Heavy libraries load when `run` is called, not before.
"""

from __future__ import annotations

from typing import Any

from .config import Config, UserError

__all__ = ["Config", "UserError", "run"]


def run(config: Config) -> dict[str, Any]:
    """Fine-tune as ``config`` says and return the report; see `pgap_kernels.finetune.job.run`."""
    from .job import run as run_job

    return run_job(config)
