"""Score prompts: the loss that a step makes small, and what an evaluation says.

One token per label   the logits of those tokens at the last position (`Scorer`), or at the mask (`MaskScorer`)
several tokens        the mean log-likelihood of each answer after the prompt (`OptionScorer`), as MeZO has it
generation            the mean loss of the answer's tokens; evaluated by greedy decoding (`AnswerScorer`)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ..losses import per_example_loss
from . import metrics
from .data import Dataset
from .examples import Example, Tokens
from .models import is_masked

#: What is measured in each task, the most telling first.
METRICS = {"classification": ("accuracy",), "choice": ("accuracy",), "generation": ("f1", "exact_match")}
#: Ways to put prompts of different lengths into a forward: padded, with a mask and each token's position; with a mask
#: alone; or not at all, so that a forward holds prompts of one length.
PADDING = ("positions", "mask", "apart")
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Encoded:
    """A left-padded batch on the model's device.

    Attributes:
        inputs: arguments for the model.
        labels: the number of each example's right answer.
        more: what else the scorer needs, by name.
        examples: what it was made of, where the scorer needs them.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    more: dict[str, Tensor] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Score:
    """Mean loss in nats, metrics from 0 to 1 by name, the number of examples, and what was said of each."""

    loss: float
    metrics: dict[str, float]
    examples: int
    said: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        return self.metrics["accuracy"]

    def as_dict(self) -> dict[str, float]:
        """Loss, metrics and the number of examples."""
        return {"loss": self.loss, **self.metrics, "examples": self.examples}


class Scorer:
    """Scores batches by one token per label.

    Args:
        model: a causal language model.
        label_tokens: the tokens that stand for the labels.
        pad_token: any valid token id; padded positions are masked.

    Attributes:
        padding: how prompts of different lengths go into a forward, one of ``PADDING``.
        metrics: what `evaluate` measures, the most telling first.
    """

    metrics = METRICS["classification"]
    has_end: bool = True  # the scores are read off a prompt's end: nothing may follow it

    def __init__(self, model: Any, label_tokens: Sequence[int], pad_token: int) -> None:
        self.model = model
        self.label_tokens = list(label_tokens)
        self.pad_token = pad_token
        self.padding = "positions"
        self._columns: dict[torch.device, Tensor] = {}

    @cached_property
    def _accepted(self) -> frozenset[str]:
        # A PEFT model's own forward passes on whatever it gets.
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return frozenset(inspect.signature(model.forward).parameters)

    # ---- batches ----------------------------------------------------------------------------------------------------

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Pad to the longest example, on the left so that the last position is every prompt's last token."""
        return Encoded(self.padded([example.tokens for example in examples]), self.labels(examples))

    def padded(self, rows: Sequence[Tokens]) -> dict[str, Tensor]:
        """Tokens of rows padded on the left, the mask of those that count, and their positions."""
        length = max(map(len, rows))
        padding = [length - len(row) for row in rows]
        device = self.model.device
        tokens = torch.tensor(
            [[self.pad_token] * pad + list(row) for pad, row in zip(padding, rows, strict=True)], device=device
        )
        columns = torch.arange(length, device=device)
        first = torch.tensor(padding, device=device)[:, None]
        # Models do not all derive positions from the mask, so a prompt's first token is told that it is position 0.
        return {
            "input_ids": tokens,
            "attention_mask": (columns >= first).long(),
            "position_ids": (columns - first).clamp(min=0),
        }

    def labels(self, examples: Sequence[Example]) -> Tensor:
        return torch.tensor([example.label for example in examples], device=self.model.device)

    # ---- losses -----------------------------------------------------------------------------------------------------

    def logits(self, batch: Encoded) -> Tensor:
        """Scores of the answers in fp32, shape (batch, answers)."""
        return self._last(batch.inputs, 1)[:, -1].index_select(1, self._labels_on(batch.labels.device)).float()

    def _last(self, inputs: dict[str, Tensor], positions: int) -> Tensor:
        """The model's logits at the last positions: only they go through the vocabulary-wide head."""
        if self.padding != "apart":
            return self._model(self._accepted_of(inputs), positions).logits[:, -positions:]
        lengths = inputs["attention_mask"].sum(1)
        found: dict[int, Tensor] = {}
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            logits = self._model({"input_ids": inputs["input_ids"][rows, -length:]}, positions).logits[:, -positions:]
            for row, values in zip(rows.tolist(), logits, strict=True):
                found[row] = functional.pad(values, (0, 0, positions - len(values), 0))
        return torch.stack([found[row] for row in range(len(lengths))])

    def _model(self, inputs: dict[str, Any], positions: int = 0, **more: Any) -> Any:
        """A forward that keeps nothing for the next one and, if ``positions``, no other logits than the last."""
        if positions and "logits_to_keep" in self._accepted:
            # As a tensor, for models then gather these positions. For a number they take a view, with gaps between the
            # rows, and for such a view torch reads the whole head once per row: 8 % of a forward of 16 rows on a CPU.
            length = inputs["input_ids"].shape[1]
            more["logits_to_keep"] = torch.arange(max(0, length - positions), length, device=self.model.device)
        if "use_cache" in self._accepted:
            more = {"use_cache": False} | more
        return self.model(**inputs, **more)

    def _accepted_of(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        left_out = () if self.padding == "positions" else ("position_ids",)
        return {name: inputs[name] for name in inputs if name in self._accepted and name not in left_out}

    def _labels_on(self, device: torch.device) -> Tensor:
        """The label tokens on a device: a list would be copied there in every forward, which no CUDA graph can do."""
        if device not in self._columns:
            with torch.inference_mode(False):
                self._columns[device] = torch.tensor(self.label_tokens, device=device)
        return self._columns[device]

    def loss(self, batch: Encoded) -> Tensor:
        """Mean cross-entropy over the answers, a scalar in fp32."""
        return functional.cross_entropy(self.logits(batch), batch.labels)

    def losses(self, batch: Encoded) -> Tensor:
        """Cross-entropy of each example over its answers, in fp32."""
        return per_example_loss(self.logits(batch), batch.labels)

    def measure(self, objective: str) -> str:
        """The metric that an objective, other than the loss, names."""
        return objective

    def errors(self, batch: Encoded, objective: str) -> Tensor:
        """1 less a metric, of each example: what steps with that objective make small. It has no gradient."""
        return (self.logits(batch).argmax(-1) != batch.labels).float()

    # ---- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], batch_size: int, progress: Progress | None = None) -> Score:
        """Loss and metrics over all of ``examples``; ``progress`` gets the number that is done each time."""
        losses, said = 0.0, [""] * len(examples)
        points = dict.fromkeys(self.metrics, 0.0)
        # By length, so that little is spent on padding; the result does not depend on the order.
        order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            part = [examples[index] for index in chosen]
            total, answers = self._judged(part)
            losses += total
            for index, (answer, found) in zip(chosen, answers, strict=True):
                said[index] = answer
                for name, value in found.items():
                    points[name] += value
            if progress is not None:
                progress(len(part))
        count = len(examples)
        return Score(losses / count, {name: value / count for name, value in points.items()}, count, tuple(said))

    def _judged(self, examples: Sequence[Example]) -> tuple[float, list[tuple[str, dict[str, float]]]]:
        """The sum of the losses, and of each example the answer given and what it is worth."""
        batch = self.encode(examples)
        logits = self.logits(batch)
        total = functional.cross_entropy(logits, batch.labels, reduction="sum").item()
        chosen = logits.argmax(-1).tolist()
        return total, [
            (example.texts[index] if example.texts else str(index), {"accuracy": float(index == example.label)})
            for example, index in zip(examples, chosen, strict=True)
        ]


class MaskScorer(Scorer):
    """Scores by one token per label at each prompt's mask token, with a masked language model."""

    has_end = False

    def __init__(self, model: Any, label_tokens: Sequence[int], pad_token: int, mask_token: int) -> None:
        super().__init__(model, label_tokens, pad_token)
        self.mask_token = mask_token

    def logits(self, batch: Encoded) -> Tensor:
        logits = self._last(batch.inputs, batch.inputs["input_ids"].shape[1])
        at = (batch.inputs["input_ids"] == self.mask_token).int().argmax(1)
        rows = torch.arange(len(at), device=at.device)
        return logits[rows, at].index_select(1, self._labels_on(logits.device)).float()


class OptionScorer(Scorer):
    """Scores by the mean log-likelihood of each answer's tokens after the prompt.

    Args:
        answers: tokens of the labels' words; examples may bring their own instead.
    """

    def __init__(self, model: Any, answers: Sequence[Tokens], pad_token: int) -> None:
        super().__init__(model, (), pad_token)
        self.answers = tuple(answers)

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """A row for each answer of each example; where others have more, an example's last one fills up."""
        options = [example.answers or self.answers for example in examples]
        most = max(map(len, options))
        rows, answers, real = [], [], []
        for example, own in zip(examples, options, strict=True):
            filled = [*own, *[own[-1]] * (most - len(own))]
            rows += [example.tokens + answer for answer in filled]
            answers += [torch.tensor(answer) for answer in filled]
            real.append([index < len(own) for index in range(most)])
        device = self.model.device
        more = {
            # On the left as the prompts, so that the answers end where the rows do.
            "answers": pad_sequence(answers, batch_first=True, padding_value=-1, padding_side="left").to(device),
            "real": torch.tensor(real, device=device),
        }
        return Encoded(self.padded(rows), self.labels(examples), more, tuple(examples))

    def logits(self, batch: Encoded) -> Tensor:
        tokens = batch.more["answers"]
        logits = self._last(batch.inputs, tokens.shape[1] + 1)[:, :-1].float()
        counts = tokens >= 0
        found = logits.log_softmax(-1).gather(2, tokens.clamp(min=0)[..., None])[..., 0]
        means = (found * counts).sum(1) / counts.sum(1)
        real = batch.more["real"]
        return means.view(real.shape).masked_fill(~real, -torch.inf)


class AnswerScorer(OptionScorer):
    """The mean loss of the right answer's tokens; evaluations let the model answer, greedily.

    Args:
        decode: tokens as text.
        end: the token that ends an answer, if there is one; the end of a line does, too.
        longest: tokens of an answer at most.
    """

    metrics = METRICS["generation"]

    def __init__(
        self, model: Any, pad_token: int, decode: Callable[[list[int]], str], end: int | None, longest: int
    ) -> None:
        super().__init__(model, (), pad_token)
        self.decode, self.end, self.longest = decode, end, longest

    def loss(self, batch: Encoded) -> Tensor:
        return self.losses(batch).mean()

    def losses(self, batch: Encoded) -> Tensor:
        return -self.logits(batch)[:, 0]

    def measure(self, objective: str) -> str:
        return "exact_match" if objective == "accuracy" else objective

    def errors(self, batch: Encoded, objective: str) -> Tensor:
        name = self.measure(objective)
        found = [self._worth(text, example)[name] for text, example in self._answers(batch.examples)]
        return 1 - torch.tensor(found, device=batch.labels.device)

    def _judged(self, examples: Sequence[Example]) -> tuple[float, list[tuple[str, dict[str, float]]]]:
        total = self.losses(self.encode(examples)).sum().item()
        return total, [(text, self._worth(text, example)) for text, example in self._answers(examples)]

    def _worth(self, text: str, example: Example) -> dict[str, float]:
        return {"f1": metrics.f1(text, example.texts), "exact_match": metrics.exact_match(text, example.texts)}

    @torch.no_grad()
    def _answers(self, examples: Sequence[Example]) -> list[tuple[str, Example]]:
        """What the model says to each prompt: its likeliest token, again and again."""
        whole = self.padded([example.tokens for example in examples])
        said: list[list[int]] = [[] for _ in examples]
        going, cache = set(range(len(examples))), None
        cached = {"use_cache", "past_key_values"} <= self._accepted and self.padding != "apart"
        inputs = whole
        for _ in range(self.longest):
            if cached:
                found = self._model(self._accepted_of(inputs), 1, use_cache=True, past_key_values=cache)
                cache, logits = found.past_key_values, found.logits
            else:
                logits = self._last(whole, 1)
            tokens = logits[:, -1].argmax(-1)
            for row in sorted(going):
                token = int(tokens[row])
                if token != self.end:
                    said[row].append(token)
                if token == self.end or "\n" in self.decode(said[row]).lstrip():
                    going.discard(row)
            if not going:
                break
            whole = self._longer(whole, tokens)
            inputs = {name: tensor if name == "attention_mask" else tensor[:, -1:] for name, tensor in whole.items()}
        # Other marks than \n that end a line may be part of an answer.
        texts = [self.decode(tokens).strip().split("\n")[0].strip() for tokens in said]
        return list(zip(texts, examples, strict=True))

    @staticmethod
    def _longer(inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """The inputs with a token more in each row."""
        more = {
            "input_ids": tokens[:, None],
            "attention_mask": torch.ones_like(tokens)[:, None],
            "position_ids": inputs["position_ids"][:, -1:] + 1,
        }
        return {name: torch.cat([tensor, more[name]], 1) for name, tensor in inputs.items()}


def scorer_of(model: Any, tokenizer: Any, data: Dataset, max_new_tokens: int = 16) -> Scorer:
    """The scorer that suits a data set and a model.

    Raises:
        UserError: a masked model with labels of several tokens.
    """
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    if pad >= model.get_input_embeddings().weight.shape[0]:
        pad = 0  # any token will do, as it is masked
    if data.task == "generation":

        def decode(tokens: list[int]) -> str:
            return tokenizer.decode(tokens, skip_special_tokens=True)

        return AnswerScorer(model, pad, decode, data.end, max_new_tokens)
    if is_masked(model):
        return MaskScorer(model, data.label_tokens, pad, tokenizer.mask_token_id)
    if data.answers and all(len(answer) == 1 for answer in data.answers):
        return Scorer(model, data.label_tokens, pad)
    return OptionScorer(model, data.answers, pad)
