"""A Ray cluster whose machines share nothing but its object store: connection, and the files and samples sent to it.

Enters: functions with plain arguments, files of this machine, samples.
Leaves: the functions' results.
May import: data, files.
"""
