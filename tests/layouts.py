"""Small data sets in exactly the official layouts, written by hand, for readers to read."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


def picture(path: Path, shade: int = 0, size: tuple[int, int] = (12, 9)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade * 7 % 256, 255 - shade, 7)).save(path)
    return path


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def coco(root: Path, count: int = 4, subset: str = "val2017") -> dict[str, Any]:
    """`annotations/captions_val2017.json` and `val2017/`; returns the content of the file."""
    images = [
        {"license": 4, "file_name": f"{i:012d}.jpg", "coco_url": "", "height": 9, "width": 12, "id": i}
        for i in range(1, count + 1)
    ]
    annotations = [
        {"image_id": i, "id": 100 * i + k, "caption": f"Caption {k} of picture {i}.\n"}
        for k in range(5)
        for i in range(1, count + 1)
    ]
    for i in range(1, count + 1):
        picture(root / subset / f"{i:012d}.jpg", i)
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    write(root / "annotations" / f"captions_{subset}.json", content)
    return content


def flickr30k(root: Path) -> dict[str, Any]:
    """Karpathy's `dataset_flickr30k.json` with two pictures of each split."""
    images = []
    for i, split in enumerate(("train", "train", "val", "val", "test", "test")):
        sentences = [
            {"tokens": ["a", "dog"], "raw": f"A dog, {k} of {i}.", "imgid": i, "sentid": 5 * i + k} for k in range(5)
        ]
        sentids = [5 * i + k for k in range(5)]
        images.append(
            {"sentids": sentids, "imgid": i, "sentences": sentences, "split": split, "filename": f"100{i}.jpg"}
        )
        picture(root / "flickr30k-images" / f"100{i}.jpg", i)
    content = {"images": images, "dataset": "flickr30k"}
    write(root / "dataset_flickr30k.json", content)
    return content


def chartqa(root: Path, subset: str = "test") -> dict[str, list[dict[str, Any]]]:
    """ChartQA's two files of a split and its charts; the second chart is in both."""
    human = [{"imgname": f"{i}.png", "query": f"What is {i}?", "label": f"{10 * i}"} for i in (1, 2)]
    augmented = [{"imgname": "2.png", "query": "What is the share?", "label": "25%"}]
    for i in (1, 2):
        picture(root / subset / "png" / f"{i}.png", i)
    write(root / subset / f"{subset}_human.json", human)
    write(root / subset / f"{subset}_augmented.json", augmented)
    return {"human": human, "augmented": augmented}


def docvqa(root: Path, subset: str = "val") -> dict[str, Any]:
    """DocVQA's file with question types and its pages; returns the content of the file."""
    rows = [
        {
            "questionId": 49150 + i,
            "question": f"What is field {i}?",
            "question_types": types,
            "image": f"documents/page_{i}.png",
            "docId": i,
            "ucsf_document_id": f"doc{i}",
            "ucsf_document_page_no": "1",
            "answers": answers,
            "data_split": subset,
        }
        for i, (types, answers) in enumerate([(["form"], ["0.28"]), (["table/list", "layout"], ["Coca Cola", "Coca"])])
    ]
    for i in range(2):
        picture(root / "documents" / f"page_{i}.png", i)
    about = {"dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": subset}
    content = about | {"data": rows}
    write(root / f"{subset}_v1.0_withQT.json", content)
    return content


def vqav2(root: Path, subset: str = "val2014") -> tuple[dict[str, Any], dict[str, Any]]:
    """Questions and annotations of three questions on two pictures."""
    answer_types = (("yes/no", "yes", "no"), ("number", "2", "3"), ("other", "red", "blue"))
    images = (42, 42, 73)
    questions, annotations = [], []
    for i, ((kind, most, other), image) in enumerate(zip(answer_types, images, strict=True)):
        people = [other] * 3 + [most] * 7
        answers = [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(people)]
        questions.append({"image_id": image, "question": f"Question {i}?", "question_id": image * 1000 + i})
        annotations.append(
            {
                "question_type": "what",
                "multiple_choice_answer": most,
                "answers": answers,
                "image_id": image,
                "answer_type": kind,
                "question_id": image * 1000 + i,
            }
        )
        picture(root / subset / f"COCO_{subset}_{image:012d}.jpg", image)
    about = {"info": {}, "license": {}, "data_subtype": subset, "data_type": "mscoco"}
    document = about | {"task_type": "Open-Ended", "questions": questions}
    answered = about | {"annotations": annotations}
    write(root / f"v2_OpenEnded_mscoco_{subset}_questions.json", document)
    write(root / f"v2_mscoco_{subset}_annotations.json", answered)
    return document, answered


def gqa(root: Path, split: str = "testdev_balanced") -> dict[str, Any]:
    """`questions1.2/testdev_balanced_questions.json` and `images/`, with the fields of the official file."""
    content = {
        f"20{i}": {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "apple (270)"}],
            "entailed": [],
            "equivalent": [f"20{i}"],
            "question": f"Is it {i}?",
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": None, "local": "06-apple_off"},
            "answer": answer,
            "semanticStr": "select: apple (270)",
            "annotations": {"answer": {}, "question": {"4": "270"}, "fullAnswer": {"3": "270"}},
            "types": {"detailed": "existC", "semantic": "obj", "structural": kind},
            "fullAnswer": "No, there are no apples.",
        }
        for i, (image, answer, kind) in enumerate(
            (("n1", "no", "verify"), ("n1", "left", "choose"), ("7", "dog", "query"))
        )
    }
    for image in ("n1", "7"):
        picture(root / "images" / f"{image}.jpg", len(image))
    write(root / "questions1.2" / f"{split}_questions.json", content)
    return content
