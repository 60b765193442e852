"""Glue between TRL's trainers and a run, and what TRL lacks.

    runs              TRL or transformers trainers inside a stage: options, log, resume after a kill, checkpoint
    starting_policy   the partially competent policy that an experiment's arms start from, built once and shared
    reward_model      a reward model learned from comparisons (Bradley-Terry)
    pairs             scored samples of a prompt, and which of them become preference pairs
    preference        sample -> score -> pair -> DPO, from offline to online
    grpo              GRPO with what TRL's trainer lacks

Importing this package loads nothing; the modules load torch and TRL.
"""

import os

# TRL reports each trainer that is made to the hub, over the network.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
