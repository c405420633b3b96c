"""The rewrite of attention to SLA2: attention calls, the rules that select them, and the passes over fx graphs."""
