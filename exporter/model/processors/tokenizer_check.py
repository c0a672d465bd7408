"""Checks a tokenizer: ids are unique, texts of all scripts can be encoded, and all ids can be decoded.

It runs in the helper process that loads processors (`inspector_process`).
"""

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

from exporter.model.processors.chat_template import PROBES

# Words in many scripts, a rare ideograph, pictographs, and characters that are in no vocabulary.
SCRIPTS = "Ünï ελλ жук שלום مرحبا नम 漢字 \U00020000 한 \U0001fae0 \ue000 \U000e0041"
TEXTS = (*PROBES, "", "zqxjv kwyh", "".join(map(chr, range(32, 127))), SCRIPTS)
LONGEST = 32  # tokens of a truncated text


class DamagedFile(ValueError):
    """A single file of a tokenizer is invalid."""

    def __init__(self, file: str, message: str) -> None:
        super().__init__(message)
        self.file = file


def refuse_shared_ids(folder: Path) -> None:
    """DamagedFile when two tokens have the same id.

    Which of the two the library then uses changes from run to run.
    """
    name = next((name for name in ("tokenizer.json", "vocab.json") if (folder / name).exists()), None)
    content = json.loads((folder / name).read_text("utf-8")) if name else None
    if name == "tokenizer.json" and isinstance(content, dict):
        model = content.get("model")
        content = model.get("vocab") if isinstance(model, dict) else None
    owners: dict[Any, str] = {}
    for token, number in content.items() if isinstance(content, dict) else ():
        if isinstance(number, int) and owners.setdefault(number, token) != token:
            raise DamagedFile(str(name), f"two tokens have the id {number}: {owners[number]!r}, {token!r}")


def try_out(tokenizer: Any, rows: int | None) -> list[tuple[str, int]]:
    """Run the calls that mmq makes on a tokenizer; returns the tokens, with ids, that a model of `rows` tokens lacks.

    Errors of the library are passed on.
    """
    special = (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    tokenizer.convert_tokens_to_ids(str(getattr(tokenizer, "image_token", special[0])))
    for text in TEXTS:
        tokenizer.batch_decode([tokenizer(text)["input_ids"]], skip_special_tokens=True)
    for side in ("left", "right"):
        tokenizer(list(TEXTS), padding=True, padding_side=side, truncation=True, max_length=LONGEST)
    if rows is None:
        return []
    answer = tokenizer.batch_decode([list(range(rows))], skip_special_tokens=True)[0]  # a model can generate every id
    if not isinstance(answer, str):
        raise TypeError("it does not decode tokens to text")
    beyond = [(token, number) for token, number in tokenizer.get_vocab().items() if number >= rows]
    return sorted(beyond, key=itemgetter(1))
