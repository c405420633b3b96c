"""The module carrier: find the attention calls of an nn.Module, and send them to sites."""
