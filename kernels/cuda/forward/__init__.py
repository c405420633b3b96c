"""The forward's kernels: block states, linear branch, sparse branch and mix."""
