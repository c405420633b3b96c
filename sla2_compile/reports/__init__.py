"""Reports on a model's attention, for people and for programs."""
