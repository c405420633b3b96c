"""The module carrier: finding the attention calls of an nn.Module, and sending them to sites."""
