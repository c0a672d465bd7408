"""Evaluation conventions of public data sets: splits, prompts, metrics, file layout, license.

Prompts and generation settings per family are those of the paper (Das et al., arXiv 2601.15287, section 3 and code),
which does not use ChartQA and DocVQA. A job uses the family's table (`families`): the same prompts, with greedy
decoding everywhere, which servers reproduce. License notes are from the data sets' pages; mmq ships no picture of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from exporter.errors import DataError


@dataclass(frozen=True)
class Convention:
    """Conventions of one data set.

    splits: mmq's split -> the data set's split. tasks: supported tasks. prompts, generation: by family.
    metrics: reported metrics, by task. measured: metrics that mmq measures besides the task's default ones.
    kinds: meaning of a sample's `kind`. layout: which files to unpack where.
    """

    name: str
    tasks: tuple[str, ...]
    splits: Mapping[str, str]
    test_size: str
    metrics: Mapping[str, str]
    layout: str
    license: str
    prompts: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, str] = field(default_factory=dict)
    kinds: str = ""
    measured: tuple[str, ...] = ()

    def require(self, task: str, split: str) -> None:
        """DataError if the data set does not support the task or has no such split."""
        if task not in self.tasks:
            raise DataError(f"{self.name} does not support task {task}", f"it supports {', '.join(self.tasks)}")
        if split not in self.splits:
            raise DataError(f"{self.name} has no split '{split}'", f"it has {', '.join(self.splits)}")


_SHORT_ANSWER = {
    "llava": "{question}\nAnswer the question using a single word or phrase.",
    "blip2": "Question: {question} Short answer:",
}
_ANSWERING = {
    "llava": "greedy, left padding",
    "blip2": "5 beams, 1 to 10 new tokens, length penalty 0, left padding",
}

CONVENTIONS: dict[str, Convention] = {
    "coco": Convention(
        name="coco",
        tasks=("captioning", "retrieval"),
        splits={"train": "train2017", "test": "val2017"},
        test_size="5,000 pictures, 25,014 captions",
        metrics={
            "captioning": "CIDEr-D, BLEU-4 (and METEOR, which mmq does not compute) after the Penn Treebank tokenizer",
            "retrieval": "recall at 1, 5 and 10 on val2017, which is not Karpathy's 5K",
        },
        layout="annotations_trainval2017.zip and val2017.zip (train2017.zip) of cocodataset.org into one folder",
        license="annotations CC BY 4.0; pictures are their Flickr authors', under the license listed with each",
        prompts={"llava": "Provide a one-sentence caption for the provided image.", "blip2": ""},
        generation={"llava": "greedy, up to 64 new tokens", "blip2": "greedy, no prompt, up to 20 tokens"},
    ),
    "flickr30k": Convention(
        name="flickr30k",
        tasks=("captioning", "retrieval"),
        splits={"train": "train", "validation": "val", "test": "test"},
        test_size="1,000 pictures, 5,000 captions (Karpathy's 1K test)",
        metrics={"retrieval": "recall at 1, 5 and 10, picture to text and text to picture", "captioning": "CIDEr-D"},
        layout="dataset_flickr30k.json (Karpathy's splits) beside the folder flickr30k-images",
        license="pictures are their Flickr authors'; released for non-commercial research and education only",
        prompts={"llava": "Provide a one-sentence caption for the provided image.", "blip2": ""},
        generation={"blip2": "none: contrastive scores choose 128 candidates, which the matching head scores again"},
    ),
    "vqav2": Convention(
        name="vqav2",
        tasks=("vqa",),
        splits={"train": "train2014", "test": "val2014"},
        test_size="214,354 questions, ten answers each, 40,504 pictures",
        metrics={"vqa": "accuracy of the VQA challenge: min(1, matches / 3) over leaving each person out"},
        layout="questions and annotations v2_*_val2014_*.json of visualqa.org beside COCO's val2014 pictures",
        license="annotations CC BY 4.0; pictures are COCO's: their Flickr authors'",
        prompts=_SHORT_ANSWER,
        generation=_ANSWERING,
        kinds="answer type: yes/no, number, other",
    ),
    "gqa": Convention(
        name="gqa",
        tasks=("vqa",),
        splits={"train": "train_balanced", "validation": "val_balanced", "test": "testdev_balanced"},
        test_size="12,578 questions, 398 pictures",
        metrics={"vqa": "exact match after the normalization of VQAv2"},
        layout="questions1.2.zip (into questions1.2/) and images.zip (into images/), both into one folder",
        license="annotations CC BY 4.0; pictures are Visual Genome's (CC BY 4.0) and their Flickr authors'",
        prompts=_SHORT_ANSWER,
        generation=_ANSWERING,
        kinds="structural type: verify, query, choose, logical, compare",
    ),
    "chartqa": Convention(
        name="chartqa",
        tasks=("vqa",),
        splits={"train": "train", "validation": "val", "test": "test"},
        test_size="2,500 questions, half written by people and half generated",
        metrics={"vqa": "relaxed accuracy: a number may be 5 % off, any other answer must be equal"},
        layout="the folder 'ChartQA Dataset' of github.com/vis-nlp/ChartQA: test/test_human.json, "
        "test/test_augmented.json and test/png/ (also train and val)",
        license="see its repository; the charts are from Statista, Pew Research, Our World in Data and the OECD",
        kinds="human or augmented questions",
        measured=("relaxed_accuracy",),
    ),
    "docvqa": Convention(
        name="docvqa",
        tasks=("vqa",),
        splits={"train": "train", "test": "val"},
        test_size="5,349 questions, 1,286 pages (the answers of DocVQA's test split are not public)",
        metrics={"vqa": "ANLS: similarity to the nearest answer, 0 below one half"},
        layout="val_v1.0_withQT.json (train_v1.0_withQT.json) and the pages (documents/) of rrc.cvc.uab.es, task 1 of "
        "DocVQA, into one folder",
        license="for research, after registration; pages are from the UCSF Industry Documents Library",
        kinds="question types: form, layout, table/list, figure/diagram and others",
        measured=("anls",),
    ),
}


@dataclass(frozen=True)
class Layout:
    """A data source that is no public data set.

    about: a few words. written: what --data takes. tasks: supported tasks. splits: how samples are divided.
    layout: its files and fields. example: the shortest valid content; empty when mmq makes or fetches the data.
    """

    name: str
    about: str
    written: str
    tasks: tuple[str, ...]
    splits: str
    layout: str
    example: str = ""


_HALVED = "half of the pictures are train and half are test"
_ALL_TASKS = ("captioning", "vqa", "retrieval")

LAYOUTS: dict[str, Layout] = {
    "folder": Layout(
        name="folder",
        about="a folder of pictures and a metadata.jsonl, .csv or .parquet",
        written="DIR or folder:DIR",
        tasks=_ALL_TASKS,
        splits=f"DIR/train, DIR/validation and DIR/test; without them, {_HALVED}",
        layout="pictures beside metadata.jsonl (one object per line), metadata.csv or metadata.parquet with file_name "
        "and caption, captions or text; or question with answer or answers; optional: id, kind, metric",
        example='{"file_name": "0001.jpg", "caption": "a dog on a beach"}\n'
        '{"file_name": "0002.jpg", "question": "what color is the car?", "answer": "red"}',
    ),
    "llava": Layout(
        name="llava",
        about="LLaVA's conversations",
        written="FILE.json or llava:FILE.json",
        tasks=("vqa",),
        splits=_HALVED,
        layout="a list of objects with id, image (relative to the file) and conversations",
        example='[{"id": "1", "image": "0001.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is '
        'it?"}, {"from": "gpt", "value": "a dog"}]}]',
    ),
    "hub": Layout(
        name="hub",
        about="a data set of the hub, or a folder of parquet files",
        written="hub:ORG/NAME, hub:ORG/NAME@REVISION, hub:coco, hub:vqav2, or a DIR of parquet files",
        tasks=_ALL_TASKS,
        splits="those of the data set; of a folder, by the files' names",
        layout="a column image with pictures, and captions, or questions with answers, under their usual names; needs "
        "the extra hub",
    ),
    "demo": Layout(
        name="demo",
        about="drawings in the made-up language of the demo models",
        written="demo",
        tasks=_ALL_TASKS,
        splits="train, validation and test, by seed",
        layout="none: mmq makes the pictures",
    ),
    "drawings": Layout(
        name="drawings",
        about="drawings in plain English; they do not measure quality",
        written="drawings",
        tasks=_ALL_TASKS,
        splits="train, validation and test, by seed",
        layout="none: mmq makes the pictures of demo",
    ),
}
