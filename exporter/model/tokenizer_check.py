"""Whether a tokenizer is sound: every id is one token's, texts of all characters are encoded, all ids decoded.

It runs in the helper process that loads processors (`inspector_process`).
"""

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

from exporter.model.chat_template import PROBES

# Words of many scripts, a rare ideograph, pictographs, and characters that no vocabulary lists.
SCRIPTS = "Ünï ελλ жук שלום مرحبا नम 漢字 \U00020000 한 \U0001fae0 \ue000 \U000e0041"
TEXTS = (*PROBES, "", "zqxjv kwyh", "".join(map(chr, range(32, 127))), SCRIPTS)
LONGEST = 32  # tokens, when a text is cut


class DamagedFile(ValueError):
    """One file of a tokenizer is wrong by itself."""

    def __init__(self, file: str, message: str) -> None:
        super().__init__(message)
        self.file = file


def refuse_shared_ids(folder: Path) -> None:
    """DamagedFile when two tokens have one id: which of them the library then knows changes from run to run."""
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
    """Ask a tokenizer what mmq will ask of it; tokens with ids that a model of `rows` tokens lacks, and these ids.

    Whatever the library raises is raised here.
    """
    known = (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    tokenizer.convert_tokens_to_ids(str(getattr(tokenizer, "image_token", known[0])))
    for text in TEXTS:
        tokenizer.batch_decode([tokenizer(text)["input_ids"]], skip_special_tokens=True)
    for side in ("left", "right"):
        tokenizer(list(TEXTS), padding=True, padding_side=side, truncation=True, max_length=LONGEST)
    if rows is None:
        return []
    answer = tokenizer.batch_decode([list(range(rows))], skip_special_tokens=True)[0]  # what a model may answer
    if not isinstance(answer, str):
        raise TypeError("it decodes tokens to something else than text")
    beyond = [(token, number) for token, number in tokenizer.get_vocab().items() if number >= rows]
    return sorted(beyond, key=itemgetter(1))
