"""Attention written out by hand: its scores are deferred in eager code, and found again in a compiler's trace."""
