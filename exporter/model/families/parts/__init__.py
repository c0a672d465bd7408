"""Towers and text models, shared by families: the fields of their configs and the shapes of all their tensors.

The shapes are those that transformers builds (`tests/test_parts.py` compares them). Computing them takes no library, so
that a plan can compare a checkpoint with its config.json in milliseconds.
"""
