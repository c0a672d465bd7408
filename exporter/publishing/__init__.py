"""What others see: summary, model card, proof, repository of the hub.

Enters: an artifact, in a folder or in a repository.
Leaves: a proven repository; differences between two artifacts.
May import: serving, evaluation, artifact, planning, data, model, demo, tasks, formats, numerics, files.
"""
