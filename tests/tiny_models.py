"""Folders of tiny random models of every family and part, complete with a processor, as exports read them."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from exporter.files.shard_writer import ShardWriter
from exporter.model.families import FAMILIES, Family
from exporter.model.processors.library import load_library

CONFIGS: dict[str, tuple[Family, dict[str, Any]]] = {
    name: (family.of(config), config) for family in FAMILIES.values() for name, config in family.tiny_configs().items()
}
QUICK: dict[str, dict[str, Any]] = {  # options of a method where a test is not about the quality of its rounding
    "rtn": {},
    "gptq": {"range": "minmax", "descent": 0},
    "awq": {"points": 4, "clip": False},
}
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")
TEMPLATE = (
    "{%- for m in messages -%}{%- for p in m['content'] if p['type'] == 'image' -%}{{ 'PICTURE' }}{%- endfor -%}"
    "{%- for p in m['content'] if p['type'] == 'text' -%}{{ 'USER: ' + p['text'] + ' ' }}{%- endfor -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


def random_weights(model: Any, seed: int = 0) -> Any:
    """The model with other weights: transformers' own initializers leave a fresh BLIP-2 blind."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = ("norm" in name.lower() or "layrnorm" in name or "ln_" in name) and "weight" in name
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if norm else 0.0))
    model.tie_weights()
    return model


def write_tiny(
    folder: Path, family: Family, dtype: torch.dtype = torch.bfloat16, config: Mapping[str, Any] | None = None
) -> Path:
    """A random model of a tiny config (the family's default one) with its processor, in one shard."""
    folder.mkdir(parents=True)
    described = {**(config or family.tiny_config()), "dtype": str(dtype).removeprefix("torch.")}
    family = family.of(described)
    write_processor(folder, family, described)
    writer = ShardWriter(folder, 10**9)
    for name, parameter in random_weights(family.skeleton(described)).named_parameters():
        writer.add(family.canonical_name(name), parameter.detach().to(dtype))
    writer.finish()
    return folder


def write_processor(folder: Path, family: Family, config: Mapping[str, Any]) -> None:
    """The files of a processor with a token for every character, and config.json."""
    import transformers

    tiny, size = family.tiny_processor(config), family.vocabulary(config)
    words(size, tiny.tokens, tiny.named).save_pretrained(folder)
    getattr(transformers, tiny.pictures)(**tiny.settings).save_pretrained(folder)
    fields = {**family.processor_fields(config), **tiny.fields, "processor_class": tiny.library}
    (folder / "processor_config.json").write_text(json.dumps(fields))
    if tiny.prompt is not None:
        (folder / "chat_template.jinja").write_text(TEMPLATE.replace("PICTURE", tiny.prompt.replace("\n", "\\n")))
    (folder / "config.json").write_text(json.dumps(config))


def words(size: int, tokens: tuple[str, ...], named: bool) -> Any:
    """A tokenizer of `size` tokens: specials, one for every ASCII character, and at the end `tokens`, last first."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *CHARACTERS])}
    fillers = size - len(vocabulary) - len(tokens)
    assert fillers >= 0
    for token in [*(f"<filler {i}>" for i in range(fillers)), *reversed(tokens)]:
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIALS, *tokens)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": tokens[0]} if named and tokens else {},
    )


@cache
def processor_of(described: str) -> Any:
    """transformers' processor of a tiny config, given as `FAMILY CONFIG`, CONFIG in JSON."""
    name, _, config = described.partition(" ")
    with TemporaryDirectory() as folder:
        write_processor(Path(folder), FAMILIES[name].of(json.loads(config)), json.loads(config))
        return load_library(Path(folder))


def tiny_inputs(
    family: Family, batch: int = 2, letters: int = 6, config: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """What the processor makes of pictures of several sizes and random texts; the last text is shorter by two letters.

    It is padded on the left, and on the right where the model has no token for pictures.
    """
    config = config or family.tiny_config()
    tiny, processor = family.tiny_processor(config), processor_of(f"{family.name} {json.dumps(config)}")
    random = np.random.default_rng(batch)
    sides = [((48, 64), (96, 32), (40, 40))[i % 3] for i in range(batch)]
    pictures = [Image.fromarray(random.integers(0, 256, (*side, 3), dtype=np.uint8)) for side in sides]
    texts = ["".join(random.choice(list(CHARACTERS[34:60]), letters + 3)) for _ in pictures]
    texts[-1] = texts[-1][:-2]
    texts = [f"{(tiny.prompt or '').strip()}{text}" for text in texts]
    side = "right" if family.image_token(config) is None else "left"
    images = [[picture] for picture in pictures] if family.nested else pictures
    made = processor(images=images, text=texts, padding=True, padding_side=side, return_tensors="pt")
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}
