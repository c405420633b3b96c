"""Decomposition of nn.MultiheadAttention: its projections around one attention call."""
