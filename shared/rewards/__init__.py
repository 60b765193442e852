"""Rewards as plain callables with TRL's signature: `reward(prompts, completions, **columns) -> list[float | None]`.

    verifiable      MathReward: is the answer right?
    format          JSONReward, LengthReward
    diversity       NGramDiversityReward, SemanticDiversityReward: how different from the other samples of the prompt?
    judge           Judge, JudgeReward: a language model's opinion, through any `Sampler`
    reward_model    RewardModel: a sequence classifier from the hub

A completion is a string or, if the prompt is a conversation, a list of chat messages; `columns` are the dataset's, one
entry per completion. None means that the reward does not apply to that row; TRL leaves such rows out of the group's
baseline. NaN and infinity are never returned: they raise ValueError with the row. Rewards that can fail on a row count
it in `counts` and, where TRL passes `log_metric`, log the share of such rows.

Importing this package loads nothing; the modules load what they need when a reward is made.
"""
