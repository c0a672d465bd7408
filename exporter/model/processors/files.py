"""Names and hashes of the processor's files: settings, tokenizer and chat templates next to a model's weights.

Also which of the files that a processor cannot do without a folder lacks.
"""

from pathlib import Path

from exporter.errors import CheckpointError
from exporter.files.file_hashes import hash_files
from exporter.files.strict_json import read_json

PATTERNS = (  # file names that transformers reads for processors, tokenizers and generation
    "*processor*.json",
    "tokenizer*",
    "chat_template*",
    "additional_chat_templates/*",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "vocab*",
    "merges*",
    "*.model",
    "*.jinja",
)
PICTURES, SETTINGS = "preprocessor_config.json", "processor_config.json"
TOKENIZERS = ("tokenizer.json", "vocab*", "*.model", "tekken.json")  # files that hold a vocabulary


def missing_files(folder: Path) -> list[str]:
    """Files without which no processor can be loaded: those that the folder lacks, with what would do instead."""
    missing = []
    if not (folder / PICTURES).exists() and not _has_pictures(folder / SETTINGS):
        missing.append(f"{PICTURES} (settings of the image processor)")
    if not any(path for pattern in TOKENIZERS for path in folder.glob(pattern)):
        missing.append("tokenizer.json (or another file with the tokenizer's vocabulary)")
    return missing


def _has_pictures(path: Path) -> bool:
    """Whether a processor_config.json has the image processor's settings; also when it cannot be read."""
    try:
        return path.exists() and "image_processor" in read_json(path)
    except CheckpointError:
        return True  # the library that reads it says what is wrong with it


def processor_files(folder: Path, *more: str) -> dict[str, str]:
    """Name in the folder -> sha256 of every file that a processor or a tokenizer is made from, and of `more`."""
    paths = sorted({path for pattern in (*PATTERNS, *more) for path in folder.glob(pattern) if path.is_file()})
    return {path.relative_to(folder).as_posix(): hashed for path, hashed in hash_files(paths).items()}
