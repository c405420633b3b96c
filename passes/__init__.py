"""The rewrite: what a call is, which calls are taken, what takes their place, and the passes over fx graphs."""
