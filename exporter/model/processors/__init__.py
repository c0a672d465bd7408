"""Processors, tokenizers and chat templates of unknown origin: inspected in a helper process, checked, loaded.

Enters: a model folder, and the fields of its config.json.
Leaves: a `Processor`, the inspection's results, a chat template for an engine.
May import: model, files.
"""
