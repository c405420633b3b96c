"""The Triton and Gluon kernels: which calls they take, how they are cut, how they are launched."""
