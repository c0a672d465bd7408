"""The built-in data sources `demo` and `drawings`: drawn scenes with captions and questions, and easy-VQA.

Enters: a task, a split, a limit and a seed.
Leaves: samples whose pictures are drawn when they are opened.
May import: data.
"""
