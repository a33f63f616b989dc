"""How a generated answer is compared with those that count as right: as in SQuAD (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is, normalised, one of those accepted, else 0."""
    return float(normalized(answer) in map(normalized, accepted))


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The best harmonic mean of precision and recall over words, of the accepted answers."""
    return max(_f1(normalized(answer).split(), normalized(right).split()) for right in accepted)


def _f1(words: Sequence[str], right: Sequence[str]) -> float:
    if not words or not right:
        return float(words == right)
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right))
