"""Where the `mmq` command starts: `python -m exporter` does the same.

Importing torch takes a second; an interrupt in that time must end as quietly as later ones.
"""

import sys

from exporter.interrupt import install


def main() -> None:
    """Run the command line."""
    install()
    try:
        from exporter.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
