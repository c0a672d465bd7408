"""Files on disk: safetensors headers, JSON, hashes, atomic writes, locks.

Enters: paths and bytes that anybody may have written.
Leaves: checked values, or one error; files that are whole or absent.
May import: no other room.
"""
