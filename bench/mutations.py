"""Handwritten mutation tests of GPTQ, AWQ, calibration and folds: each inserts one error that a test must detect.

    python -m bench.mutations [--jobs 2]

For every mutation, the tests of its method run in a changed copy of the package until one fails. Exit code 1 if the
tests miss a mutation. `tests/test_architecture.py` checks that the source lines named here still exist.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GPTQ, AWQ, COLUMNS = "exporter/methods/gptq.py", "exporter/methods/awq.py", "exporter/numerics/gptq_columns.py"
SMOOTH, BLOCK, INPUTS = (
    "exporter/quantization/smoothing.py",
    "exporter/quantization/block.py",
    "exporter/quantization/block_inputs.py",
)
CALIBRATE, CALLS = "exporter/quantization/calibrate.py", "exporter/quantization/block_calls.py"
FOLDS, TOWERS = "exporter/numerics/scale_folding.py", "exporter/model/families/parts/vision.py"
KERNEL, RANGES_KERNEL = "exporter/numerics/gptq_columns_kernel.py", "exporter/numerics/ranges_kernel.py"
TESTS = {
    "gptq": ["tests/test_gptq.py", "tests/test_methods.py"],
    "kernels": ["tests/test_kernels.py"],  # on a CPU with Triton's interpreter, if Triton is installed
    "calibration": [
        "tests/test_calibrate.py",
        "tests/test_whole_forward.py",
        "tests/test_nonfinite.py",
        "tests/test_exact_folds.py",
        "tests/test_source_error.py",
    ],
    "folds": ["tests/test_folds.py", "tests/test_families.py"],
    "awq": ["tests/test_awq.py", "tests/test_folds.py", "tests/test_smooth.py", "tests/test_methods.py"],
}


@dataclass(frozen=True)
class Mutation:
    """One mutation: in `file`, `before` (which occurs once) becomes `after`."""

    method: str
    description: str
    file: str
    before: str
    after: str


MUTATIONS = (
    Mutation(
        "gptq",
        "errors are added instead of subtracted",
        COLUMNS,
        "upper[i : i + 1, i + 1 :], alpha=-1)",
        "upper[i : i + 1, i + 1 :])",
    ),
    Mutation(
        "gptq",
        "a block's errors do not reach later blocks",
        GPTQ,
        "addmm_(errors, upper[part, end:], alpha=-1)",
        "addmm_(errors, upper[part, end:], alpha=0)",
    ),
    Mutation("gptq", "errors are not divided by the pivot", COLUMNS, ") / upper[i, i]", ")"),
    Mutation(
        "gptq",
        "groups follow the processing order, not the columns",
        GPTQ,
        "order // scheme.columns_per_group(len(order))",
        "order.sort().values // scheme.columns_per_group(len(order))",
    ),
    Mutation("gptq", "codes stay in processing order", GPTQ, "codes.index_select(1, order.argsort())", "codes"),
    Mutation(
        "gptq",
        "a column's importance is not squared",
        GPTQ,
        "diagonal().square().reciprocal()",
        "diagonal().reciprocal()",
    ),
    Mutation("gptq", "descent includes a column's own error", GPTQ, "    hessian.diagonal().zero_()\n", ""),
    Mutation("gptq", "descent ignores a column's previous error", COLUMNS, "new_error - error", "new_error"),
    Mutation(
        "gptq",
        "a column that is always 0 keeps a zero diagonal",
        GPTQ,
        "torch.where(active, diagonal, mean) + damping",
        "diagonal + damping",
    ),
    Mutation(
        "gptq",
        "a group's scale in the loop uses the importance of the first columns",
        GPTQ,
        "counts[first : first + weight.shape[1]]",
        "counts[: weight.shape[1]]",
    ),
    Mutation("gptq", "descent runs on an indefinite Hessian", GPTQ, "options.descent and not notes", "options.descent"),
    Mutation(
        "calibration",
        "q, k and v share one scale per tensor",
        BLOCK,
        'row.rule and row.rule.group_size != "tensor"',
        "row.rule",
    ),
    Mutation(
        "calibration",
        "every block gets the arguments of the first",
        INPUTS,
        "        self.calls = self.calls[1:]\n",
        "",
    ),
    Mutation(
        "calibration",
        "arguments that depend on outputs are accepted",
        CALLS,
        "    if len(blocks) > 1:\n",
        "    if len(blocks) > 99:\n",
    ),
    Mutation(
        "calibration",
        "writes to tensors between blocks are accepted",
        CALLS,
        "if any(tensor._version != version",
        "if any(tensor._version < version",
    ),
    Mutation(
        "calibration",
        "a block with another input is accepted",
        CALLS,
        "        if added is None:",
        "        if hidden is None:",
    ),
    Mutation(
        "calibration",
        "the last block runs without need",
        CALIBRATE,
        "count = 1 + max((names.index(block) for block in calibrated), default=-1)",
        "count = len(names) if calibrated else 0",
    ),
    Mutation(
        "calibration",
        "non-finite tokens keep their weight",
        INPUTS,
        "torch.where(finite, weights, 0.0)",
        "torch.where(finite, weights, 1.0)",
    ),
    Mutation(
        "calibration",
        "rows that overflow in a block stay in the statistics",
        BLOCK,
        "                    counted = finite\n",
        "",
    ),
    Mutation("calibration", "any number of tokens may be excluded", INPUTS, "MAX_EXCLUDED = 0.1", "MAX_EXCLUDED = 1.0"),
    Mutation(
        "calibration",
        "inexact folds are applied",
        SMOOTH,
        "if not folds_exactly(block, smoothing)]",
        "if not folds_exactly(block, smoothing) and False]",
    ),
    Mutation(
        "calibration",
        "a check leaves its scales in the block",
        SMOOTH,
        "    block.restore(original)\n    size = ",
        "    size = ",
    ),
    Mutation(
        "calibration",
        "float16 scales stop at the smallest normal number",
        "exporter/numerics/ranges.py",
        "2.0**-24 if dtype == torch.float16",
        "2.0**-14 if dtype == torch.float16",
    ),
    Mutation(
        "calibration",
        "weights rounded to zero are accepted",
        BLOCK,
        "    if error <= MAX_RATIO:\n",
        "    if error == error:\n",
    ),
    Mutation("folds", "the rows of k are used instead of v", TOWERS, "rows=(2, 3)", "rows=(1, 3)"),
    Mutation(
        "folds",
        "scales cross a GELU",
        TOWERS,
        'Smoothing("layer_norm1", _QKV),',
        'Smoothing("layer_norm1", _QKV),\n        Smoothing("mlp.fc1", ("mlp.fc2",)),',
    ),
    Mutation(
        "awq",
        "large weights raise a scale",
        AWQ,
        "size**ratio / relative ** (1 - ratio)",
        "size**ratio * relative ** (1 - ratio)",
    ),
    Mutation(
        "awq", "scales are not centred", AWQ, "scales.clamp(1 / LARGEST_SCALE", "(7 * scales).clamp(1 / LARGEST_SCALE"
    ),
    Mutation("awq", "the worst candidate wins", AWQ, "if error < least:", "if error > least:"),
    Mutation("awq", "a candidate's weight is not unscaled", AWQ, "zero, scheme) / scales", "zero, scheme)"),
    Mutation(
        "awq",
        "a candidate weight stays in the block",
        SMOOTH,
        "    block.restore(original)\n    return error\n",
        "    return error\n",
    ),
    Mutation(
        "awq",
        "a search on the block runs it on four batches",
        SMOOTH,
        "return None if any(row.rule and row.rule.parsed_options().runs_block for row in unit.rows) else CHECKED",
        "return CHECKED",
    ),
    Mutation("awq", "clipping tries ranges down to a tenth", AWQ, "1 - 0.5 * step / steps", "1 - 0.9 * step / steps"),
    Mutation(
        "awq",
        "a clipped row is used when its error is larger",
        AWQ,
        "helps = _row_errors(weight, hessian, scale, zero, scheme) <",
        "helps = _row_errors(weight, hessian, scale, zero, scheme) >",
    ),
    Mutation("awq", "a folded bias keeps its size", FOLDS, "bias[rows] /= scales", "bias[rows] /= 1"),
    Mutation(
        "awq",
        "a norm's rounding is not compensated",
        FOLDS,
        "columns = applied.repeat(repeats)",
        "columns = scales.repeat(repeats)",
    ),
    Mutation(
        "awq", "a norm's bias is divided by the requested scales", FOLDS, "to(wide) / applied)", "to(wide) / scales)"
    ),
    Mutation("kernels", "errors are added instead of subtracted", KERNEL, "remaining -= error", "remaining += error"),
    Mutation(
        "kernels", "descent ignores a column's previous error", KERNEL, "(error - old_error)[:, None]", "error[:, None]"
    ),
    Mutation("kernels", "the worst range wins", RANGES_KERNEL, "(error < best)", "(error > best)"),
)


def detecting_test(mutation: Mutation) -> str | None:
    """The first test that fails with the mutation, or None."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for part in ("exporter", "tests", "recipes", "bench"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / mutation.file
        file.write_text(file.read_text().replace(mutation.before, mutation.after))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS[mutation.method]]
        path = os.pathsep.join([name, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        failed = re.search(r"^FAILED (.+?)(?: - |$)", done.stdout, re.MULTILINE)
        if done.returncode not in (0, 1):
            raise SystemExit(
                f"{mutation.description}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        return failed[1] if failed else None


def runnable() -> list[Mutation]:
    """Mutations that can run here; those of the kernels need Triton."""
    return [m for m in MUTATIONS if m.method != "kernels" or importlib.util.find_spec("triton")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    missed, mutations = 0, runnable()
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutation, test in zip(mutations, pool.map(detecting_test, mutations), strict=True):
            missed += test is None
            print(f"{mutation.method:7} {mutation.description:52} {test or 'NOT DETECTED'}", flush=True)
    if skipped := len(MUTATIONS) - len(mutations):
        print(f"skipped {skipped} mutations of the kernels: Triton is not installed")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
