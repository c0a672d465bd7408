"""Models as stored: checkpoints, families, processors, and transformers models whose weights are loaded on demand.

Enters: a folder, an embedded name, or a repository of the hub.
Leaves: a `Checkpoint`, its `Family`, a `Processor`, a `Stream`.
May import: demo, files.
"""
