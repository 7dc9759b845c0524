"""The flow loss and its gradients as one call, for a backend that has it: path, head, loss and backward of
`ops/velocity_head.py` with nothing of Python between the launches. `cuda.py` alone."""
