"""Vision towers and text models that families share: fields of their configs, and shapes of all their tensors.

Enters: an object of a config.json.
Leaves: checked fields, shapes, and the blocks with their linears.
May import: model, files.

The shapes are those that transformers builds (`tests/test_parts.py` compares them). They are computed without
transformers, so that a plan can compare a checkpoint with its config.json within milliseconds.
"""
