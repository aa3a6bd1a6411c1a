"""Measured and verified selection: what runs each operation fastest on the GPU at hand, and its cache."""
