"""Names and hashes of the processor's files: settings, tokenizer and chat templates next to a model's weights."""

from pathlib import Path

from exporter.files.file_hashes import hash_files

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


def processor_files(folder: Path, *more: str) -> dict[str, str]:
    """Name in the folder -> sha256 of every file that a processor or a tokenizer is made from, and of `more`."""
    paths = sorted({path for pattern in (*PATTERNS, *more) for path in folder.glob(pattern) if path.is_file()})
    return {path.relative_to(folder).as_posix(): hashed for path, hashed in hash_files(paths).items()}
