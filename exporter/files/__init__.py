"""Files on disk and on the hub: safetensors headers, JSON, YAML, hashes, atomic writes, locks, the hub's errors.

Enters: paths, names of repositories, and bytes from untrusted sources.
Leaves: checked values, or one error; files that are either complete or absent.
May import: no other room.
"""
