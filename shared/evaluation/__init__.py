"""Metrics of sampled text and answers, in plain numpy.

Each returns one number per problem, prompt or sample wherever that is defined, since that is what verdicts resample:
intervals are those of `shared.experiments.claims`. Import the module you need; nothing is loaded before that.

    at_k        pass@k and maj@k
    diversity   words, n-grams, compression, entropy, attribute values, semantic classes
    win_rate    comparisons with a baseline
"""
