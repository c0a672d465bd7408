"""What a busy server asks for: the one place that reads `Retry-After`."""


def retry_after(header: str | None) -> float | None:
    """Seconds to wait, None when nothing is said; the header's other form, a date, is ignored."""
    asked = (header or "").strip()
    return float(asked) if asked.isascii() and asked.isdigit() else None
