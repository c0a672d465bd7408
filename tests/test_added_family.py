"""A family in twenty lines: LLaVA-NeXT-Video's pictures. What the registry's tests ask holds without another test."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.model.families import FAMILIES, Family
from tests import test_conformance, test_families, test_headers, test_new_families, test_parts, tiny_models
from tests.headers import make, published, read

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


HEADER = "llava-hf--LLaVA-NeXT-Video-7B-hf"
PUBLISHED = published.CONFIGS["llava-hf--llava-v1.6-vicuna-7b-hf"][0] | {
    "architectures": list(FAMILY.architectures),
    "model_type": "llava_next_video",
    "video_token_index": 32001,
}


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
    test_conformance.test_an_evaluated_export_has_a_complete_report(FAMILY.name, tmp_path / "evaluated")


@pytest.mark.slow
@pytest.mark.usefixtures("added")
def test_an_added_family_resumes(tmp_path: Path) -> None:
    """As the families of the registry do, of which test_conformance.py stops those with passes of their own."""
    test_conformance.check_stopped(FAMILY.name, tmp_path / "stopped", every_unit=False)


@pytest.mark.usefixtures("added")
def test_an_added_family_is_planned_at_its_true_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header follows from a published config.json, as those of the registry do."""
    monkeypatch.setitem(published.CONFIGS, HEADER, (PUBLISHED, published.LLAVA))
    monkeypatch.setattr(read, "HEADERS", tmp_path)
    (tmp_path / f"{HEADER}.json").write_text(make.render(published.header_of(PUBLISHED, published.LLAVA)))
    test_headers.test_transformers_builds_these_names_and_shapes(HEADER)
    test_families.test_names_are_total_and_injective_on_real_headers(HEADER)
    test_families.test_targets_match_their_linears_under_both_names_and_no_others(HEADER)

    def sparse(name: str) -> Path:
        return read.write_sparse_checkpoint(tmp_path / name, name)

    test_new_families.test_vllm_matches_every_linear_of_a_published_checkpoint_to_its_scheme(HEADER, sparse)
    test_new_families.test_tensors_of_a_published_checkpoint_that_are_kept_have_a_reason(HEADER, sparse)


def test_an_added_family_that_describes_another_model_does_not_conform(
    added: tuple[Family, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phases of the tower are out of order: what the tests must see."""
    family, config = added
    vision, *others = family.components
    wrong = replace(family, components=(replace(vision, phases=vision.phases[::-1]), *others))
    with pytest.raises(AssertionError):
        test_families.test_members_of_a_phase_receive_the_same_tensor(wrong, config)
