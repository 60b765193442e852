"""Tasks with verifiable answers: procedural generators and loaders of public datasets.

Every source returns plain rows: dicts with at least `question` and `answer` (strings), and `steps` (a list of
strings) where the source has worked solutions. Import the module you need; nothing is loaded before that.
"""
