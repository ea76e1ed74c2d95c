"""Numbers and counts as text, alike in tables, sentences and figures. No torch."""
from __future__ import annotations

from typing import Sequence


def rate_label(rate: float) -> str:
    """'dense' for 0, else the rate in a few digits."""
    return f"{rate:g}" if rate else "dense"


def rate_list(rates: Sequence[float]) -> str:
    """'rate 0.1', 'rates 0.1 and 0.2', 'dense'."""
    plural = "s" if len([rate for rate in rates if rate]) > 1 else ""
    labels = ["dense"] if 0 in rates else []
    named = [rate_label(rate) for rate in rates if rate]
    return " and ".join(labels + ([f"rate{plural} {listed(named)}"] if named else []))


def listed(names: Sequence[str], word: str = "and") -> str:
    """'a', 'a and b', 'a, b and c'."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


def counted(count: int, noun: str) -> str:
    """'1 image', '2 images'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """'40 s', '3 minutes', '5 hours': a time in one or two digits."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{float(f'{seconds:.1g}'):g} s"


def gigabytes(size: float) -> str:
    """'3.4 GB', '120 MB': a number of bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def number(value: float | None) -> str:
    """A value in four digits, '–' for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}".replace("-", "−")


def percent(share: float) -> str:
    """'66 %': a share in whole percent."""
    return f"{100 * share:.0f} %".replace("-", "−")


def change(value: float, dense: float) -> str:
    """'−14.0 %': a value as a change from dense."""
    return f"{100 * (value / dense - 1):+.1f} %".replace("-", "−") if dense else "no change"
