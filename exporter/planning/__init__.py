"""Recipes and plans: the decision for every tensor, with predicted memory and time, before anything is computed.

Enters: a recipe, a family, the headers of a checkpoint, a device.
Leaves: a `Plan` with its `Step`s, or an error that lists every problem.
May import: model, data, formats, methods, numerics, files.
"""
