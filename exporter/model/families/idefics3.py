"""The Idefics 3 and SmolVLM families: SigLIP on tiles of the picture -> pixel shuffle and one linear -> Llama.

Checkpoint names are those of `HuggingFaceM4/Idefics3-8B-Llama3` and `HuggingFaceTB/SmolVLM2-2.2B-Instruct`;
transformers and vLLM (models/idefics3.py, whose tower has no 16-bit linears) use the same.
"""

from dataclasses import replace
from typing import Any

from exporter.model.families.component import Component, Config, Pass, head, single, stack
from exporter.model.families.config_fields import MAX_ROWS, Flag, Number
from exporter.model.families.family import Family, Sizes
from exporter.model.families.parts.part import Shapes, TinyProcessor, below, field_of, size_of, tied_misfit
from exporter.model.families.parts.text import LLAMA
from exporter.model.families.parts.vision import IDEFICS3

TILES = 4 * 3 + 1  # a picture of 640 x 480 pixels, scaled to four tiles a row, and the whole picture
_SCALE, _TIED = Number("scale_factor", 2, most=64), Flag("tie_word_embeddings", False)
_TOWERS = ("idefics3_vision", "smolvlm_vision", "idefics3", "smolvlm")  # the files of one model name it differently
PARTS = {"vision_config": dict.fromkeys(_TOWERS, IDEFICS3), "text_config": {"llama": LLAMA}}


def shapes(sizes: Sizes) -> Shapes:
    """Shapes of all tensors of a checkpoint."""
    vision, text, top = sizes["vision_config"], sizes["text_config"], sizes[""]
    tensors = below("model.vision_model", IDEFICS3.shapes(vision)) | below("model.text_model", LLAMA.shapes(text))
    shuffled = vision["hidden_size"] * top["scale_factor"] ** 2
    tensors["model.connector.modality_projection.proj.weight"] = (text["hidden_size"], shuffled)
    return tensors | (
        {} if top["tie_word_embeddings"] else {"lm_head.weight": (text["vocab_size"], text["hidden_size"])}
    )


def misfits(sizes: Sizes) -> list[str]:
    """Problems: the two flags for a tied head differ; the patches of a tile's side cannot be merged evenly."""
    vision, scale = sizes["vision_config"], sizes[""]["scale_factor"]
    side = vision["image_size"] // vision["patch_size"]
    uneven = [f"scale_factor: {scale} does not divide the {side} patches of a tile's side"] if side % scale else []
    return uneven + tied_misfit(sizes, "transformers reads the first one and vLLM the second one")


def patches(config: Config) -> int:
    """Patches of one tile."""
    side, patch = (size_of(PARTS, config, "vision_config", name) for name in ("image_size", "patch_size"))
    return int(side // patch) ** 2


def image_tokens(config: Config) -> int:
    """Tokens of a picture in a prompt, without the texts between its tiles."""
    return TILES * patches(config) // int(_SCALE.of(config)) ** 2


def assemble(config: Config) -> tuple[Component, ...]:
    """The components for a config.json."""
    vision = stack(
        "vision",
        PARTS,
        "vision_config",
        "model.vision_model",
        config,
        target=r"model\.vision_model\.encoder\.layers\.{i}",
        tokens=lambda config: TILES * patches(config),
    )
    name = "model.connector.modality_projection"
    projector = single("projector", name, ("proj",), target=name.replace(".", r"\."), tokens=image_tokens)
    language = stack(
        "language",
        PARTS,
        "text_config",
        "model.text_model",
        config,
        target=r"model\.text_model\.layers\.{i}",
        tokens=lambda config: image_tokens(config) + 128,  # prompt, reply, and the texts between the tiles
        passes=(Pass(padded=True),),
    )
    return vision, projector, language, head("lm_head", lambda config: int(not _TIED.of(config)))


def tiny_processor(config: Config) -> TinyProcessor:
    """A processor that cuts pictures into at most four tiles."""
    settings: dict[str, Any] = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    marks = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    tokens = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *marks)
    return TinyProcessor("Idefics3Processor", "Idefics3ImageProcessorPil", settings, {}, tokens, "<image>")


FAMILY = Family(
    name="idefics3",
    models="Idefics 3, SmolVLM of 2024",
    heading="idefics-3-and-smolvlm",
    architectures=("Idefics3ForConditionalGeneration",),
    config_class="Idefics3Config",
    parts=PARTS,
    assemble=assemble,
    shapes=shapes,
    misfits=misfits,
    fields=(_SCALE, _TIED, Number("image_token_id", 128257, least=0, most=MAX_ROWS)),
    question_prompt="{question} Answer briefly.",
    caption_prompt="Provide a one-sentence caption for the provided image.",
    fallback_prompt="<|begin_of_text|>User:<image>{text}<end_of_utterance>\nAssistant:",
    reply_end="<end_of_utterance>",
    max_new_tokens={"vqa": 10, "captioning": 64},
    tasks=("vqa", "captioning"),
    image_tokens=image_tokens,
    varies=True,
    nested=True,
    positions=field_of(PARTS, "text_config", "max_position_embeddings"),
    vocabulary=field_of(PARTS, "text_config", "vocab_size"),
    pixels=lambda config: (int(size_of(PARTS, config, "vision_config", "image_size")),) * 2,
    processor_fields=lambda config: {"image_seq_len": patches(config) // int(_SCALE.of(config)) ** 2},
    tied={"lm_head.weight": "model.text_model.embed_tokens.weight"},
    tiny={
        "model_type": "idefics3",
        "image_token_id": 127,
        "pad_token_id": 3,
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    tiny_processor=tiny_processor,
)
SMOLVLM = replace(
    FAMILY,
    name="smolvlm",
    models="SmolVLM2",
    architectures=("SmolVLMForConditionalGeneration",),
    config_class="SmolVLMConfig",
    fallback_prompt="<|im_start|>User:<image>{text}<end_of_utterance>\nAssistant:",
    engine_packages=("num2words",),  # transformers' processor refuses to be built without it
    tiny=dict(FAMILY.tiny) | {"model_type": "smolvlm"},
    tiny_processor=lambda config: replace(
        tiny_processor(config), library="SmolVLMProcessor", pictures="SmolVLMImageProcessorPil"
    ),
)
