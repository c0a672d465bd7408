"""Entry point of the `mmq` command and of `python -m exporter`.

The import of torch takes about a second; an interrupt during it must end without a traceback too.
"""

import os
import sys

from exporter.commands.interrupt import install, raise_if_interrupted

PROCESSOR_COMMANDS = ("plan", "export")  # commands that inspect a model's processor in a helper process


def main() -> None:
    """Run the command line."""
    install()
    try:
        try:
            if sys.argv[1:2] and sys.argv[1] in PROCESSOR_COMMANDS and not {"-h", "--help"} & set(sys.argv):
                from exporter.model.processor_inspector import start_helper

                start_helper(_model(sys.argv))  # the helper loads its libraries while this process loads torch
            from exporter.commands.main import main as run

            run()
        except Exception:
            raise_if_interrupted()  # a library may have turned the interrupt into another error
            raise
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError:  # before or after a command, which prints its own message
        sys.stderr.write("Error: out of memory on the host\n")
        sys.exit(4)
    except SystemExit as end:
        _leave(end)


def _leave(end: SystemExit) -> None:
    """End the process with click's exit code; at once when it used a GPU, because Python then frees memory for seconds.

    Every file is closed and every thread has ended by now, so nothing is lost.
    """
    if "torch" in sys.modules:
        from exporter.device import uses_gpu

        if uses_gpu() and isinstance(end.code, int | None):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code or 0)
    raise end


def _model(arguments: list[str]) -> str | None:
    """Value of `--model`; None without it."""
    for word, next_word in zip(arguments, [*arguments[1:], None], strict=True):
        if word == "--model":
            return next_word
        if word.startswith("--model="):
            return word.removeprefix("--model=")
    return None


if __name__ == "__main__":
    main()
