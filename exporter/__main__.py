"""Where the `mmq` command starts: `python -m exporter` does the same.

Importing torch takes a second; an interrupt in that time must end as quietly as later ones.
"""

import sys

from exporter.commands.interrupt import install, raise_if_asked

ASK_PROCESSORS = ("plan", "export")  # commands that ask a helper process about a model's processor


def main() -> None:
    """Run the command line."""
    install()
    try:
        try:
            if sys.argv[1:2] and sys.argv[1] in ASK_PROCESSORS and not {"-h", "--help"} & set(sys.argv):
                from exporter.model.processor_inspector import start_helper

                start_helper(_model(sys.argv))  # it loads its libraries while torch is loaded here
            from exporter.commands.main import main as run

            run()
        except Exception:
            raise_if_asked()  # an interrupt that a library took for its own error
            raise
    except KeyboardInterrupt:
        sys.exit(130)


def _model(arguments: list[str]) -> str | None:
    """The value of `--model`, None when there is none."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        if word == "--model":
            return following
        if word.startswith("--model="):
            return word.removeprefix("--model=")
    return None


if __name__ == "__main__":
    main()
