"""Training rows of `bench/smollm2_llava.py`: conversations about drawings in plain words, and prose.

A row has one picture and several conversations about it. Each conversation is a slot that attends only to the picture
and itself, so its logits equal those of a sequence with this conversation alone (a test compares).
"""

import bz2
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.data.demo.language import QUESTIONS, Dice, plain_captions, question
from exporter.data.demo.scenes import SceneObject

PROMPTS = {"captioning": "Describe the picture.", "vqa": "{question} Answer in one or two words."}
KINDS = tuple(kind for kind in QUESTIONS if kind not in ("find", "name"))  # those need the made-up names
LEARNED, UNSEEN = "Emma", "Persuasion"  # novels
IMAGE_TOKENS = 64
IGNORED = -100
CHUNK = 4000  # scenes drawn at once
ASKED = 2  # about each picture, beside the caption
STRING = b"\x00\x04\x00\x09"  # R's serialized string: flags, then 4 bytes of length, then the bytes


@dataclass(frozen=True)
class Rows:
    """Packed rows, int32 `[n, tokens]`.

    tokens: ids. labels: the next token of a reply, else IGNORED. slots: 0 for the picture's prefix, 1 and up for
    conversations, -1 for padding. positions: as if every conversation followed the picture directly.
    """

    tokens: Tensor
    labels: Tensor
    slots: Tensor
    positions: Tensor

    def part(self, index: Tensor) -> "Rows":
        """The rows of `index`, int64 `[m]`."""
        return Rows(*(tensor[index] for tensor in (self.tokens, self.labels, self.slots, self.positions)))

    def to(self, device: torch.device) -> "Rows":
        """The rows on a device."""
        return Rows(*(tensor.to(device) for tensor in (self.tokens, self.labels, self.slots, self.positions)))

    def mask(self) -> Tensor:
        """Which token attends to which, bool `[n, 1, tokens, tokens]`; padding attends to the picture."""
        order = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        to, of = self.slots[:, None, :], self.slots[:, :, None]
        return ((order[:, None] >= order) & ((to == of) | (to == 0)))[:, None]


def pack(conversations: Sequence[Sequence[tuple[str, str]]], tokenizer: Any, image: int) -> Rows:
    """One row for each picture from its (prompt, reply) pairs. image: the id of the image token."""
    prefix = [*tokenizer("<|im_start|>user\n")["input_ids"], *[image] * IMAGE_TOKENS, *tokenizer("\n")["input_ids"]]
    flat = [pair for row in conversations for pair in row]
    prompts = tokenizer([f"{prompt}<|im_end|>\n<|im_start|>assistant\n" for prompt, _ in flat])["input_ids"]
    replies = iter(zip(prompts, tokenizer([f"{reply}<|im_end|>" for _, reply in flat])["input_ids"], strict=True))
    columns: list[list[list[int]]] = [[], [], [], []]
    for row in conversations:
        start = len(prefix)
        tokens, labels, slots = list(prefix), [IGNORED] * start, [0] * start
        positions = list(range(start))
        for number in range(1, len(row) + 1):
            prompt, reply = next(replies)
            tokens += prompt + reply
            labels += [IGNORED] * (len(prompt) - 1) + reply + [IGNORED]
            slots += [number] * (len(prompt) + len(reply))
            positions += range(start, start + len(prompt) + len(reply))
        for column, values in zip(columns, (tokens, labels, slots, positions), strict=True):
            column.append(values)
    longest = -(-max(map(len, columns[0])) // 8) * 8  # attention with a mask is faster
    pads = (0, IGNORED, -1, 0)
    return Rows(
        *(
            torch.tensor([row + [pad] * (longest - len(row)) for row in column], dtype=torch.int32)
            for column, pad in zip(columns, pads, strict=True)
        )
    )


def conversations(objects: Sequence[SceneObject], index: int, questions: int) -> list[tuple[str, str]]:
    """The caption of a scene, and `questions` questions of different kinds about it."""
    pairs = [(PROMPTS["captioning"], plain_captions(objects)[0])]
    dice = Dice(index)
    start = dice.roll(len(KINDS))
    turns = [KINDS[(start + 3 * step) % len(KINDS)] for step in range(len(KINDS))]
    questions_of_scene = [item for kind in turns if (item := question(kind, objects, index)) is not None][:questions]
    return pairs + [(PROMPTS["vqa"].format(question=item.text), item.answer) for item in questions_of_scene]


def novels(rdata: Path) -> dict[str, str]:
    """Title -> text of Jane Austen's six novels (public domain), from `Rdata.rdb` of Debian's r-cran-janeaustenr.

    The file is a sequence of R objects: 4 bytes of length, a compressor (`2` bzip2, `Z` xz, else zlib), the data.
    """
    content, texts = rdata.read_bytes(), {}
    while content:
        raw = content[4:]
        reader: Any = {b"2": bz2.BZ2Decompressor, b"Z": lzma.LZMADecompressor}.get(raw[:1], zlib.decompressobj)()
        data = reader.decompress(raw[1:] if raw[:1] in (b"2", b"Z") else raw)
        lines = list(_strings(data))
        texts[lines[0].strip().title()] = "\n".join(lines[1:]).strip()
        content = reader.unused_data
    return texts


def _strings(data: bytes) -> Iterator[str]:
    """The strings of a serialized character vector of R."""
    at = data.find(STRING)
    while at >= 0 and data[at + 2 : at + 4] == STRING[2:]:
        length = int.from_bytes(data[at + 4 : at + 8], "big")
        yield data[at + 8 : at + 8 + length].decode("utf-8", "replace")
        at += 8 + length


def prose_rows(text: str, tokenizer: Any, length: int) -> Tensor:
    """The text's tokens in rows, int64 `[n, length]`; the rest is dropped."""
    ids = torch.tensor(tokenizer(" ".join(text.split()))["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)
