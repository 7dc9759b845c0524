"""The check of the kernels on a GPU, and experiments with what they might be instead, until one has decided."""
