"""The router's kernels: pooled tokens, block scores, selection."""
