"""nn.MultiheadAttention taken apart: its projections around one attention call."""
