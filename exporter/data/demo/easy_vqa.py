"""easy-VQA (Victor Zhou, 2019, MIT): one shape on a plain 64 px picture and template questions.

mmq contains a part of its test split (`easy_vqa_test.png`, `easy_vqa_test.json`, see `LICENSE_NOTE`); the demo models
were trained on its train split. Accuracy from the question alone, without the picture, is 0.66.
"""

import json
from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import Image

from exporter.data.demo.scenes import SIDE

FOLDER = Path(__file__).parent
COLUMNS = 20  # pictures in one row of the sheet
QuestionAndAnswer = tuple[str, str]  # question, answer


def kind(answer: str) -> str:
    """Question type: `easy-vqa yes/no`, `easy-vqa shape` or `easy-vqa color`."""
    if answer in ("yes", "no"):
        return "easy-vqa yes/no"
    return "easy-vqa shape" if answer in ("circle", "rectangle", "triangle") else "easy-vqa color"


@cache
def _sheet() -> Image.Image:
    with Image.open(BytesIO((FOLDER / "easy_vqa_test.png").read_bytes())) as sheet:
        return sheet.convert("RGB")


def test_picture(i: int) -> Image.Image:
    """Picture `i` of the embedded test subset, RGB 64 x 64."""
    left, top = i % COLUMNS * SIDE, i // COLUMNS * SIDE
    return _sheet().crop((left, top, left + SIDE, top + SIDE))


def test_questions() -> list[tuple[int, list[QuestionAndAnswer]]]:
    """(number in easy-VQA's test split, questions with answers) of every embedded picture, in sheet order."""
    content = json.loads((FOLDER / "easy_vqa_test.json").read_text(encoding="utf-8"))
    return [(int(entry["image"]), [(q, a) for q, a in entry["questions"]]) for entry in content["pictures"]]
