"""Tasks: procedural generators of worlds whose truth is known, and loaders of public datasets.

Sources of problems return plain rows: dicts with at least `question` and `answer` (strings), and `steps` (a list of
strings) where the source has worked solutions. The generated worlds of the post-training papers (persona, story, ideas,
writing, fold, operators) and `hub.load_prompts`, their public counterparts, return rows with `prompt` and `item`.
Import the module you need; nothing is loaded before that.
"""
