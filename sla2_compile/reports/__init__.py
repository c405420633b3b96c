"""What became of a model's attention, for people and for programs."""
