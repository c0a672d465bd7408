"""Publishing to the hub: artifact summary, model card, proof before the upload, repository.

Enters: an artifact, in a folder or in a repository.
Leaves: a proven repository; differences between two artifacts.
May import: serving, evaluation, artifact, planning, inference, data, model, demo, tasks, formats, numerics, files.
"""
