"""Models, as stored and as run: checkpoints, families, processors, weights loaded on demand, and inference.

Enters: a folder, an embedded name, or a repository of the hub; samples that a model answers.
Leaves: a `Checkpoint`, its `Family`, a `Processor`, a `Stream`; answers.
May import: data, files.
"""
