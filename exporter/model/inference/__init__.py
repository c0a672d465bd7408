"""Model inference with transformers in this process, or through an OpenAI-compatible server.

Enters: samples and a model, or the URL of a server.
Leaves: texts, log-likelihoods, rankings; activations through hooks.
May import: model, data, files.
"""
