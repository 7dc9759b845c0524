"""The flow loss of each row and its gradients as one call: what `ops/velocity_head.py` composes of the other kernels,
with nothing of Python between the launches. `cuda.py` alone has it, and `serves_flow_loss` says which calls it takes:

ℓ = mean_j (v − u)²      v = head(x_t, t, h)      dv = (2 / d) · coefficient · (v − u), and backward from there

Gradients of matrices are rounded to their dtype. Those of vectors stay float32, in the order of the parameters, but
Σ dy, dγ and dβ of each layer: b_1, b_2, then (b, γ, β) of each layer, b_out.
"""
