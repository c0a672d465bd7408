"""Entry point of the `mmq` command and of `python -m exporter`.

The import of torch takes about a second; an interrupt during it must end without a traceback too.
"""

import os
import sys

from exporter.commands.interrupt import install, raise_if_interrupted
from exporter.transformers_import import only_mmq_runs_here

PROCESSOR_COMMANDS = ("plan", "export")  # commands that inspect a model's processor in a helper process


def main() -> None:
    """Run the command line."""
    install()
    only_mmq_runs_here()
    try:
        try:
            if sys.argv[1:2] and sys.argv[1] in PROCESSOR_COMMANDS and not {"-h", "--help"} & set(sys.argv):
                _start_ahead(sys.argv)
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
    if "exporter.device" in sys.modules:
        from exporter.device import uses_gpu

        if uses_gpu() and isinstance(end.code, int | None):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code or 0)
    raise end


def _start_ahead(arguments: list[str]) -> None:
    """Start what takes time: the helper that loads a processor, and for plans the CUDA driver.

    They load their libraries while this process loads its own.
    """
    from exporter.model.processors.inspector import start_helper

    start_helper(_value(arguments, "--model"))
    if arguments[1] == "plan" and _value(arguments, "--device") != "cpu":
        from exporter.cuda_driver import start

        start()


def _value(arguments: list[str], option: str) -> str | None:
    """Value of an option; None without it."""
    for word, next_word in zip(arguments, [*arguments[1:], None], strict=True):
        if word == option:
            return next_word
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return None


if __name__ == "__main__":
    main()
