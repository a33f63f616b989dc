"""Fine-tune a language model on your own data without a backward pass, and measure what a step costs.

`run` is the whole job; ``pgap-kernels finetune`` is its command line. `Config` holds the options and `UserError` is
raised for anything the user can put right. Heavy libraries load when `run` is called, not before.
"""

from __future__ import annotations

from typing import Any

from .config import Config
from .errors import UserError

__all__ = ["Config", "UserError", "run"]


def run(config: Config) -> dict[str, Any]:
    """Fine-tune as ``config`` says and return the report.

    With one seed, see `pgap_kernels.finetune.job.run`; with several, `pgap_kernels.finetune.seeds.run`, which makes a
    run of each.
    """
    from . import job, seeds

    return job.run(config) if len(config.seeds) == 1 else seeds.run(config, job.run)
