"""Glue between TRL's trainers and a run, and what TRL lacks.

    runs              TRL or transformers trainers inside a stage: options, log, resume after a kill, checkpoint
    starting_policy   the partially competent policy that an experiment's arms start from, built once and shared
    pairs             scored samples of a prompt, and which of them become preference pairs
    preference        sample -> score -> pair -> DPO, from offline to online
    grpo              GRPO with what TRL's trainer lacks

Importing this package loads nothing; the modules load torch and TRL.
"""
