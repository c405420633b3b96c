"""A call's launches, worked out once for its layout and made again without Triton's launcher."""
