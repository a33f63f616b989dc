"""Where the time of steps goes: forward, perturb, refresh, and the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

PARTS = ("forward", "perturb", "refresh", "rest")


@dataclass
class StepClock:
    """Accumulated wall seconds of completed steps.

    Attributes:
        steps: completed steps.
        seconds: seconds by part since the first step.
    """

    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    _total: float = 0.0

    def add(self, elapsed: float, accumulated: dict[str, float]) -> None:
        """Count one step of ``elapsed`` seconds, after which the optimizer's own counters stand at ``accumulated``."""
        self.steps += 1
        self._total += elapsed
        parts = {part: accumulated.get(part, 0.0) for part in PARTS[:-1]}
        self.seconds = parts | {"rest": max(0.0, self._total - sum(parts.values()))}

    def per_step(self, refresh_seconds: float, window: int) -> dict[str, float]:
        """Seconds of one step by part and in ``total``: an ordinary step, plus its share of one refresh per window."""
        if not self.steps:
            return {}
        parts = {part: self.seconds[part] / self.steps for part in PARTS} | {"refresh": refresh_seconds / window}
        return parts | {"total": sum(parts.values())}
