"""Recipes and plans: the decision for every tensor, with memory and seconds, before anything is computed.

Enters: a recipe, a family, the headers of a checkpoint, a device.
Leaves: a `Plan` with its `Step`s, or every reason why there is none.
May import: inference, data, model, tasks, formats, methods, numerics, files.
"""
