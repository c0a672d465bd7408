"""Rows of `bench/smollm2_llava.py`: several conversations in one row predict what each predicts alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.smollm2_model import LowRank, add_adapters, scores_of
from bench.smollm2_rows import IMAGE_TOKENS, conversations, novels, pack, prose_rows
from exporter.data.demo.scenes import draw, scene_objects, scenes

IMAGE = 128


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text: str | list[str]) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": [ord(letter) for letter in text]}
        return {"input_ids": [self(one)["input_ids"] for one in text]}


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 130, "initializer_range": 0.3}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 64, "patch_size": 8, "projection_dim": 16}
    settings = {"text_config": text, "vision_config": vision, "image_token_index": IMAGE, "vision_feature_layer": -1}
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig.from_dict(settings)).eval()


@torch.no_grad()
def alone(model: Any, pixels: Tensor, prompt: str, reply: str) -> Tensor:
    """The logits before each token of the reply and of its end, from transformers' own forward pass."""
    from tools.demo_training.packing import normalize

    before = f"{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = [*map(ord, "<|im_start|>user\n"), *[IMAGE] * IMAGE_TOKENS, *map(ord, f"\n{before}{reply}<|im_end|>")]
    logits = model(input_ids=torch.tensor([ids]), pixel_values=normalize(pixels[None])).logits[0]
    count = len(f"{reply}<|im_end|>")
    result: Tensor = logits[-count - 1 : -1]
    return result


def test_packed_conversations_have_the_logits_of_each_conversation_alone(model: Any) -> None:
    batch = scenes("test", torch.arange(2))
    pixels = draw(batch)
    pairs = [conversations(objects, i, 2) for i, objects in enumerate(scene_objects(batch))]
    with torch.no_grad():
        scores, labels = scores_of(model, pixels, pack(pairs, Letters(), IMAGE))
    expected = [(alone(model, pixels[i], *pair), pair[1]) for i, row in enumerate(pairs) for pair in row]
    assert scores.std() > 0.1
    torch.testing.assert_close(scores, torch.cat([logits for logits, _ in expected]), atol=1e-4, rtol=1e-4)
    assert labels.tolist() == [ord(letter) for _, reply in expected for letter in f"{reply}<|im_end|>"]


def test_an_adapter_adds_its_product_only_while_it_is_enabled() -> None:
    torch.manual_seed(0)
    base, x = torch.nn.Linear(6, 4), torch.randn(3, 6)
    adapter = LowRank(base, 2)
    assert torch.equal(adapter(x), base(x))  # untrained
    torch.nn.init.normal_(adapter.up)
    torch.testing.assert_close(adapter(x), x @ (base.weight + adapter.up @ adapter.down).T + base.bias)
    adapter.enabled = False
    assert torch.equal(adapter(x), base(x))


def test_every_linear_of_the_blocks_gets_an_adapter_and_nothing_else_is_trained(model: Any) -> None:
    import copy

    changed = copy.deepcopy(model)
    adapters = add_adapters(changed, 2)
    assert len(adapters) == 2 * 7
    trained = {name for name, p in changed.model.language_model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{side}" for name in adapters for side in ("down", "up")}


def test_reads_novels_of_the_debian_package(tmp_path: Any) -> None:
    import bz2
    import zlib

    def vector(*lines: str) -> bytes:
        encoded = (line.encode() for line in lines)
        return b"X\n....." + b"".join(b"\x00\x04\x00\x09" + len(t).to_bytes(4, "big") + t for t in encoded)

    first, second = vector("EMMA", "", "one", "two"), vector("PERSUASION", "three")
    blocks = [zlib.compress(first), b"2" + bz2.compress(second)]
    sizes = [len(first), len(second)]
    content = b"".join(size.to_bytes(4, "big") + block for size, block in zip(sizes, blocks, strict=True))
    (tmp_path / "Rdata.rdb").write_bytes(content)
    found = novels(tmp_path / "Rdata.rdb")
    assert found == {"Emma": "one\ntwo", "Persuasion": "three"}
    assert prose_rows(found["Emma"], Letters(), 3).tolist() == [[*map(ord, "one")], [*map(ord, " tw")]]
