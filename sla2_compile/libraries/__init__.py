"""Adapters in the attention registries of transformers and diffusers, and a check for peft."""
