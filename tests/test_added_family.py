"""A family in twenty lines: LLaVA-NeXT-Video's pictures. What the registry's tests ask holds without another test."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.model.families import FAMILIES, Family
from tests import test_conformance, test_families, test_new_families, test_parts, tiny_models

NEXT = FAMILIES["llava-next"]
FAMILY = replace(
    NEXT,
    name="llava-next-video",
    models="LLaVA-NeXT-Video, pictures only",
    architectures=("LlavaNextVideoForConditionalGeneration",),
    config_class="LlavaNextVideoConfig",
    fallback_prompt="USER: <image>\n{text} ASSISTANT:",
    tiny=dict(NEXT.tiny) | {"model_type": "llava_next_video", "video_token_index": 126},
    tiny_processor=lambda config: replace(NEXT.tiny_processor(config), library="LlavaNextVideoProcessor"),
)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> tuple[Family, dict[str, Any]]:
    """The registry with the family, and its tiny model."""
    config = FAMILY.tiny_config()
    monkeypatch.setitem(FAMILIES, FAMILY.name, FAMILY)
    monkeypatch.setitem(tiny_models.CONFIGS, FAMILY.name, (FAMILY.of(config), config))
    return tiny_models.CONFIGS[FAMILY.name]


def test_an_added_family_conforms(
    added: tuple[Family, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, config = added
    test_new_families.test_every_family_is_selected_by_its_architecture()
    test_parts.test_shapes_of_every_part(family, config)
    test_parts.test_defaults_are_those_of_transformers(family)
    test_families.test_every_linear_is_planned_or_kept_with_a_reason(family, config)
    test_families.test_skeleton_has_the_buffers_of_an_eager_model(family, config)
    test_families.test_members_of_a_phase_receive_the_same_tensor(family, config)
    test_families.test_streamed_blocks_equal_the_whole_model(family, config)
    test_families.test_every_smoothing_is_an_exact_fold(family, config)
    test_conformance.test_statistics_equal_those_of_the_whole_forward_pass(
        family, config, tmp_path / "statistics", monkeypatch
    )
    test_conformance.test_every_component_is_what_transformers_opens(FAMILY.name, "awq", tmp_path / "export")


def test_an_added_family_that_describes_another_model_does_not_conform(
    added: tuple[Family, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phases of the tower are out of order: what the tests must see."""
    family, config = added
    vision, *others = family.components
    wrong = replace(family, components=(replace(vision, phases=vision.phases[::-1]), *others))
    with pytest.raises(AssertionError):
        test_families.test_members_of_a_phase_receive_the_same_tensor(wrong, config)
