"""Tasks: procedural generators of worlds whose truth is known, and loaders of public datasets.

All return plain rows, dicts. Sources of problems (arith, gsm8k) have at least `question` and `answer` (strings), and
`steps` (a list of strings) where there are worked solutions. The generated worlds of the post-training papers (story,
ideas, writing, fold, operators; persona has one prompt) have `prompt` and what their reward needs. `hub.load_prompts`,
their public counterparts, has `prompt` and `item`, and `question` and `answer` where these can be checked.
Import the module you need; nothing is loaded before that.
"""
