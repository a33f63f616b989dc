"""Whether a model's scores survive padding and what else is in a batch: found out before the first step.

A short prompt alone, given to the model as it is, must score as it does beside a long one. Families differ in where
positions start (RoBERTa), whether they follow the mask (BART) and whether there is a mask at all (RWKV): what fits is
tried, not looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .errors import UserError, is_out_of_memory
from .examples import Example
from .scoring import PADDING, Scorer

# Relative to the largest score, by the type of the weights. Rounding stays below; wrong positions, or padding that is
# seen, are far above.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


APART = "this model's scores change with padding: a forward holds prompts of one length, which takes longer"


@torch.no_grad()
def choose(scorer: Scorer, examples: Sequence[Example]) -> str | None:
    """Set a scorer's way of padding to the first that leaves scores as they are.

    Args:
        scorer: its ``padding`` is set.
        examples: of the run; the shortest and the longest are tried.

    Returns:
        What to tell the user, or None where prompts are padded.

    Raises:
        UserError: no way does, or the model sees what follows a prompt.
    """
    short, long = (pick(examples, key=lambda example: len(example.tokens)) for pick in (min, max))
    tolerance = TOLERANCE[scorer.model.dtype]
    scorer.padding = "apart"
    try:
        _scores(scorer, [long], 0)
    except (IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"--max-length: the model cannot read the longest prompt, of {len(long.tokens)} tokens "
            f"({(str(error).splitlines() or [type(error).__name__])[0]}); accepted: fewer"
        ) from error
    plain = _scores(scorer, [short], 0)
    if not torch.isfinite(plain).any():
        raise UserError("--model: the scores of a first prompt are not finite; accepted: a model that works")
    if scorer.has_end and _sees_what_follows(scorer, short):
        raise UserError(
            "--model: what follows a prompt changes its scores, as in an encoder; accepted: causal language models, "
            "and encoders with a head for masked tokens"
        )
    # The same tokens in another order: of the same length, and another prompt.
    twin = replace(short, tokens=short.tokens[::-1])
    for way in PADDING:
        scorer.padding = way
        others = [twin, twin] if way == "apart" else [twin, long, long]
        if all(
            _close(plain, _scores(scorer, batch, index), tolerance)
            for batch, index in (([short], 0), ([short, *others], 0), ([*others, short], -1))
        ):
            return None if way != "apart" else APART
    raise UserError(
        "--model: a prompt's scores depend on what else is in its batch, even without padding; accepted: models that "
        "keep the examples of a batch apart"
    )


def _scores(scorer: Scorer, examples: Sequence[Example], index: int) -> Tensor:
    scores = scorer.logits(scorer.encode(examples))[index]
    return scores[: len(examples[index].answers) or None]


def _sees_what_follows(scorer: Scorer, example: Example) -> bool:
    """Whether the scores at the end of a prompt change when it goes on.

    Its own last tokens are what follows, as there may be no positions for more.
    """
    tokens = example.tokens if len(example.tokens) > 1 else example.tokens * 4
    end = max(1, len(tokens) - 3)
    rows = [torch.tensor([some], device=scorer.model.device) for some in (tokens[:end], tokens)]
    alone, followed = (scorer.model(input_ids=row).logits[0, end - 1] for row in rows)
    return not _close(alone.float(), followed.float(), TOLERANCE[scorer.model.dtype])


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool(((one - other).abs() <= tolerance * one.abs().max()).all())
