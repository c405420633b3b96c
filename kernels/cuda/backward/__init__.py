"""The backward of `sla2::attention` on a GPU: kernels, and their launches."""
