"""Fine-tune a language model on your own data without a backward pass, and measure what a step costs.

`run` is the whole job; ``pgap-kernels finetune`` is its command line. `Config` holds the options and `UserError` is
raised for anything the user can put right. Heavy libraries load when `run` is called, not before.

    job        a run from loading to the report; seeds makes several
    training   its steps, evaluations and checkpoints; comparison, baseline: the method in plain PyTorch beside them
    scoring    losses and metrics of examples; padding tries out what a model's scores survive
    data       a data set for a run, of examples, of records of a file; builtin and fetch: those that come with wheels
    models     the model, its adapter, and the layers that are tuned
    report     what is written: figure, page, table

Imports: seeds -> job -> training -> comparison, checkpoint -> scoring -> data, models -> examples, layers -> records,
config -> options, builtin -> fetch -> errors; report -> page, table -> figure -> timing.
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
