"""Where the `mmq` command starts: `python -m exporter` does the same.

Importing torch takes a second; an interrupt in that time must end as quietly as later ones.
"""

import signal
import sys


def main() -> None:
    """Run the command line."""
    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs start with SIGINT ignored
        signal.signal(stop, signal.default_int_handler)
    try:
        from exporter.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
