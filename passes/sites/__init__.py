"""One attention call: its arguments, its mask, the rules that admit it, and the module that replaces it."""
