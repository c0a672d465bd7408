"""Vision towers and text models that families share: fields of their configs, and shapes of all their tensors.

The shapes are those that transformers builds (`tests/test_parts.py` compares them). They are computed without
transformers, so that a plan can compare a checkpoint with its config.json within milliseconds.
"""
