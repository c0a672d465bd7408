"""Where the `mmq` command starts: `python -m exporter` does the same.

Importing torch takes a second; an interrupt in that time must end as quietly as later ones.
"""

import sys

from exporter.interrupt import install, raise_if_asked


def main() -> None:
    """Run the command line."""
    install()
    try:
        try:
            from exporter.cli import main as run

            run()
        except Exception:
            raise_if_asked()  # an interrupt that a library took for its own error
            raise
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
