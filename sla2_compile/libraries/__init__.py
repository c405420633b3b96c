"""Backends in the registries of transformers and diffusers."""
