"""The parts of the pass fuse-attention: from a softmax to one call of scaled_dot_product_attention."""
