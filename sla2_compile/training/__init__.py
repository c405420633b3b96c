"""Training of what SLA2 adds to a model."""
