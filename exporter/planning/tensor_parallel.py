"""Rule tensor-parallel of vLLM: what several GPUs that share every linear need."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from exporter.model.families import FAMILIES
from exporter.numerics.quantized import BLOCK
from exporter.planning.rule import WORD_BITS
from exporter.planning.vllm_rules import Linear, last_name, packed_in_words

# Last names of linears that tensor parallelism divides along their inputs; it divides all others along their outputs.
ROW_PARALLEL = frozenset(
    name.rpartition(".")[2]
    for family in FAMILIES.values()
    for config in family.tiny_configs().values()
    for component in family.assemble(config)
    for name in component.row_parallel
)


def parallel_problems(linears: Iterable[Linear], degree: int) -> list[str]:
    """Rule tensor-parallel: linears that cannot be divided among `degree` GPUs; none for one GPU."""
    problems = []
    for linear in linears:
        rows, columns = linear.shape
        if last_name(linear.name) not in ROW_PARALLEL:
            if rows % degree:
                problems.append(f"{linear.name}: {rows} outputs")
            elif linear.scheme and linear.scheme.group_size == "block" and rows // degree % BLOCK:
                problems.append(f"{linear.name}: {rows} outputs in blocks of {BLOCK}")
        elif columns % degree:
            problems.append(f"{linear.name}: {columns} inputs")
        elif linear.scheme and linear.scheme.group_size not in ("row", "tensor"):
            size = linear.scheme.columns_per_group(columns)
            if columns // degree % size:
                problems.append(f"{linear.name}: {columns} inputs in groups of {size}")
        elif degree > 1 and packed_in_words(linear.scheme) and columns // degree * linear.scheme.bits % WORD_BITS:
            problems.append(f"{linear.name}: {columns} inputs of {linear.scheme.bits} bits in 32-bit words")
    return [f"rule tensor-parallel: {problem} cannot be divided among {degree} GPUs" for problem in problems]


def head_problems(heads: Mapping[str, int], shared: Mapping[str, int], degree: int) -> list[str]:
    """Rule tensor-parallel: attention heads that cannot be divided among `degree` GPUs.

    heads: of the model's parts. shared: their key and value heads, of which vLLM gives each GPU some, or gives one to
    several GPUs.
    """
    problems = [f"{part}: {number} attention heads" for part, number in heads.items() if number % degree]
    problems += [f"{part}: {n} key and value heads" for part, n in shared.items() if n % degree and degree % n]
    return [f"rule tensor-parallel: {problem} cannot be divided among {degree} GPUs" for problem in problems]


def input_parts(modules: Iterable[str], degree: int) -> dict[str, int]:
    """The modules whose inputs are divided, by name, with the number of GPUs among which they are."""
    return {module: degree for module in modules if last_name(module) in ROW_PARALLEL and degree > 1}


def shard(linear: Linear, degree: int) -> Linear:
    """The part of a linear that one of `degree` devices holds."""
    rows, columns = linear.shape
    by_inputs = last_name(linear.name) in ROW_PARALLEL
    return replace(linear, shape=(rows, columns // degree) if by_inputs else (rows // degree, columns))
