"""Answers of a model, computed by transformers in this process or by a server.

Enters: samples and a model, or the URL of a server.
Leaves: texts, log-likelihoods, rankings; activations through hooks.
May import: model, tasks.
"""
