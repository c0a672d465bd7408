"""Work on a Ray cluster whose machines share nothing but its object store: connection, files, samples.

Enters: functions with plain arguments, files of this machine, samples.
Leaves: the functions' results.
May import: tasks, files.
"""
