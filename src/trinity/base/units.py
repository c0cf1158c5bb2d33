"""Parse and print quantities. The only place that knows SI prefixes; batch and horizon are always in tokens."""

import re

from trinity.base.errors import UsageError

_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def parse_count(text: str | int | float) -> int:
    """'17T' -> 17_000_000_000_000, '1.5M' -> 1_500_000, 4096 -> 4096. Raises UsageError on anything else."""
    if isinstance(text, (int, float)):
        return int(text)
    match = re.fullmatch(r"\s*([0-9][0-9_,]*\.?[0-9]*)\s*([kKmMgGbBtT]?)\s*", text)
    if not match:
        raise UsageError(f"'{text}' is not a count.", "Write a number with an optional K, M, B or T, such as 1.5M.")
    return round(float(match[1].replace("_", "").replace(",", "")) * _POWERS[match[2].lower()])


def parse_bytes(text: str | int) -> int:
    """'4G' and '4GB' -> 4_000_000_000, '512MiB' -> 536_870_912, '80' -> 80. Raises UsageError on anything else."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*)\s*(?:([kmgt]?)(i?)b?)\s*", text.lower())
    if not match or (match[3] and not match[2]):
        raise UsageError(f"'{text}' is not a number of bytes.", "Write one such as 800M, 4G or 4GiB.")
    power = "kmgt".index(match[2]) + 1 if match[2] else 0
    return round(float(match[1]) * (1024 if match[3] else 1000) ** power)


def show_count(value: float) -> str:
    """1_500_000 -> '1.5M'. Three significant digits, prefix K, M, B or T."""
    for power, prefix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if abs(value) >= power:
            return f"{value / power:.3g}{prefix}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show_bytes(value: float) -> str:
    """1536 -> '1.5 KiB'."""
    for power, prefix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= power:
            return f"{value / power:.1f} {prefix}"
    return f"{value:.0f} B"


def show_seconds(value: float) -> str:
    """75.2 -> '1m15s', 3.21 -> '3.2s', 0.0321 -> '32ms', 90000 -> '1d1h'."""
    if 0 < value < 0.1:
        return f"{1000 * value:.2g}ms"
    if value < 60:
        return f"{value:.1f}s"
    whole = round(value)
    days, hours, minutes, seconds = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s"
