"""Models as they are stored: checkpoints, families, processors, and a transformers model with weights on demand.

Enters: a folder, an embedded name, or a repository of the hub.
Leaves: a `Checkpoint`, its `Family`, a `Processor`, a `Stream`.
May import: demo, files.
"""
