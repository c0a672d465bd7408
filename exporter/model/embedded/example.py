"""The example picture in the package, a scene of the test split, and questions that models can answer about it."""

from pathlib import Path

PICTURE = Path(__file__).parent / "example.png"
SCENE = ("test", 1)  # split and index of `data.demo.samples.picture`
QUESTION = "what shape is the large magenta object?"
ANSWER = "diamond"
