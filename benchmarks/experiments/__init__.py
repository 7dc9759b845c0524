"""Kernels that the package might use instead of what it does, until a measurement on a GPU has decided."""
