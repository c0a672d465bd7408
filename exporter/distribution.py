"""Name of the distribution on package indexes, version of mmq, and the command that installs an extra."""

DISTRIBUTION = "mmq-vlm"  # `mmq` on the package index is another project
PROGRAM = "mmq"  # the command, and the key of its version in files
VERSION = "0.1.0"  # pyproject.toml reads it here


def install_extra(extra: str) -> str:
    """The command that installs mmq with an extra, from a checkout because no package index has mmq."""
    return f"pip install '.[{extra}]' in a checkout of mmq"


def installed_version(package: str) -> str | None:
    """Version of a Python package; None if it is not installed. For mmq itself it is `VERSION`."""
    from importlib.metadata import PackageNotFoundError, version

    if package == PROGRAM:
        return VERSION
    try:
        return version(package)
    except PackageNotFoundError:
        return None
