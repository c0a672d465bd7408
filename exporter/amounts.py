"""Text for amounts: bytes as kB, MB, GB or GiB; seconds as s, min or h."""


def size(count: float) -> str:
    """Bytes as text in units of powers of 1000, as disks and the hub count: `1.5 kB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def memory(count: float) -> str:
    """Bytes as text in GiB: `1.50 GiB`."""
    return f"{count / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds as text: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
