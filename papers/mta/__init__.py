"""Multi-Token Attention (arXiv 2504.00927): attention weights that depend on several queries, keys and heads."""
