"""Format numbers for readers. A missing or non-finite value is a dash."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

DASH = "–"
NOT_RUN = "Not run yet."
BROUGHT = "Not trained: the embeddings were brought with the items."
SPACE = "\N{NARROW NO-BREAK SPACE}"
BEYOND = "beyond chance"

Gain = tuple[float, float, float, int]  # relative gain, half its 95 % interval, p value, seeds


def known(value: Any) -> bool:
    """Return whether ``value`` is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def count(value: Any) -> str:
    """Format ``12345`` as ``12,345``."""
    return f"{round(value):,}" if known(value) else DASH


def number(value: Any, digits: int = 3) -> str:
    """Format a decimal with ``digits`` places; very small numbers in powers of ten."""
    if not known(value):
        return DASH
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−")


def share(value: Any, digits: int = 1) -> str:
    """Format ``0.1234`` as ``12.3 %``; a share is never rounded up to a full 100 % or down to a bare 0 %."""
    if not known(value):
        return DASH
    percent, step = 100 * value, 10.0**-digits
    if 0 < percent < step / 2:
        return f"<{SPACE}{step:g}{SPACE}%"
    if 100 - step / 2 <= percent < 100:
        return f">{SPACE}{100 - step:.{digits}f}{SPACE}%"
    return f"{percent:.{0 if percent in (0, 100) else digits}f}{SPACE}%"


def seconds(value: Any) -> str:
    """Format ``3723.4`` as ``1 h 2 min``; below a minute with one decimal."""
    if not known(value):
        return DASH
    if value < 60:
        return f"{value:.1f}{SPACE}s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{SPACE}h {minutes}{SPACE}min" if hours else f"{minutes}{SPACE}min {rest}{SPACE}s"


def plain(value: Any) -> str:
    """Format a value of unknown kind: numbers short, lists and mappings on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items()) or DASH
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or DASH
    if isinstance(value, float):
        return f"{value:,.4g}" if known(value) else DASH
    if isinstance(value, int) and not isinstance(value, bool):
        return count(value)
    return DASH if value is None else str(value)


def mean(values: Sequence[float]) -> float:
    """Return the mean, or NaN if there are no values."""
    return sum(values) / len(values) if values else math.nan


def listed(words: list[str]) -> str:
    """Join words: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def plural(value: int, noun: str) -> str:
    """Format ``1 item``, ``2 items``."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def measure(key: str) -> str:
    """Abbreviate ``recall@50`` to ``R@50``."""
    plain = key.replace("corrected_", "Corrected ").replace("recall@", "R@").replace("ndcg@", "N@")
    return {"auc": "AUC", "gauc": "GAUC", "gauc_users": "Users in GAUC"}.get(key, plain)


def gained(result: Gain | None, digits: int = 1) -> str:
    """Format a gain as ``+8.3% ± 2.1% (p 0.01)``; without a spread the gain alone."""
    if result is None:
        return DASH
    gain, half, p, _ = result
    return f"{gain:+.{digits}%}" + (f" ± {half:.{digits}%} (p {p:.2g})" if math.isfinite(half) else "")


def sure(result: Gain) -> str:
    """Return whether the interval excludes 0."""
    gain, half, _, seeds = result
    return "one seed: not told from chance" if seeds == 1 else (BEYOND if abs(gain) > half else "within chance")
