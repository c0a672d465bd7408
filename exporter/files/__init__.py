"""Files on disk: safetensors headers, JSON, YAML, hashes, atomic writes, locks.

Enters: paths and bytes from untrusted sources.
Leaves: checked values, or one error; files that are either complete or absent.
May import: no other room.
"""
