"""Blocked PyTorch for any device: what runs where no Triton kernel does."""
