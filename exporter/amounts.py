"""Bytes and seconds in the units that people read."""


def size(count: float) -> str:
    """Bytes for people: powers of 1000, as disks and hubs count."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def memory(count: float) -> str:
    """Memory in GiB."""
    return f"{count / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
