"""Output heads that config.json ties to the embedding: both must have the same values, also with an adapter.

transformers 5.19 and vLLM 0.32 read a stored head whose values differ from the embedding's in spite of config.json;
other versions and programs read the embedding: the same folder is two models.
"""

from collections.abc import Iterator

from exporter.errors import CheckpointError
from exporter.files.safetensors_header import read_excerpts
from exporter.lazy_torch import torch
from exporter.model.checkpoint import Checkpoint
from exporter.model.families import Family

PLACES, LENGTH = 16, 4096  # of a plan's comparison: excerpts of each tensor, and their bytes


def tied(checkpoint: Checkpoint, family: Family) -> Iterator[tuple[str, str]]:
    """Head and embedding that share their values by config.json, by checkpoint name; the head may not be stored."""
    own = family.shapes(family.read(checkpoint.config)[0])
    return ((head, embedding) for head, embedding in family.tied.items() if embedding in own and head not in own)


def refuse_trained_apart(checkpoint: Checkpoint, family: Family) -> None:
    """CheckpointError when the adapter changes a head or an embedding that share their values."""
    adapter = checkpoint.adapter
    changed = {*adapter.pairs, *adapter.whole} if adapter else set()
    for head, embedding in tied(checkpoint, family):
        if names := sorted({head, embedding} & changed):
            raise CheckpointError(
                f"{adapter.folder if adapter else ''}: the adapter changes {names[0]}, but config.json ties {head} to "
                f"{embedding}",
                "merge it with peft into a model with `tie_word_embeddings: false`, and export that",
            )


def refuse_unlike(checkpoint: Checkpoint, family: Family) -> None:
    """CheckpointError as `refuse_different`, from excerpts of both tensors: for plans, which take a second.

    Heads that equal the embedding in all excerpts, or whose files are not on this machine, pass.
    """
    for head, embedding in _stored(checkpoint, family):
        infos = [checkpoint.tensors[name] for name in (head, embedding)]
        paths = [checkpoint.folder / info.file for info in infos]
        if not all(path.is_file() for path in paths):
            continue
        pairs = zip(paths, infos, strict=True)
        first, second = (read_excerpts(path, info.stored, PLACES, LENGTH) for path, info in pairs)
        if [len(part) for part in first] == [len(part) for part in second] and first != second:
            raise _difference(checkpoint, head, embedding)


def refuse_different(checkpoint: Checkpoint, family: Family) -> None:
    """CheckpointError when a stored head differs from the embedding to which config.json ties it; reads both."""
    for head, embedding in _stored(checkpoint, family):
        if not torch.equal(checkpoint.read(head), checkpoint.read(embedding)):
            raise _difference(checkpoint, head, embedding)


def _stored(checkpoint: Checkpoint, family: Family) -> Iterator[tuple[str, str]]:
    """Those of `tied` whose head is stored beside the embedding."""
    return ((head, embedding) for head, embedding in tied(checkpoint, family) if head in checkpoint.tensors)


def _difference(checkpoint: Checkpoint, head: str, embedding: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.origin}: config.json ties {head} to {embedding}, but the stored tensors differ: "
        "some versions of transformers and vLLM would use the head, and others the embedding",
        "set `tie_word_embeddings: false` in config.json (also in its `text_config`) if the head was trained, or "
        "remove the head",
    )
