"""Reading and writing fx graphs from any tracer."""
