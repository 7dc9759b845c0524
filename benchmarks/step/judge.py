"""What a training step must compute before it is timed.

Its loss, and gradients of the trunk and of its head, are compared with a plain copy of the model under torch's
cross-entropy, plus the reference's flow loss on the same noise and times; of the published step with our rows, weights
and texts of `SFRConfig.official()`. The trunk computes the same bits for all. A mean over n rows may be off by 4 ε / √n
(ε of the dtype); the flow loss, whose rows share the rounding of the head, by ε / 4; a gradient by √ε.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sfr_kernels import flow_matching_loss, reference
from sfr_kernels.rows import IGNORE_INDEX

from ..case import Run, WrongResultError
from .providers import BACKWARD, Batch, Step

SEED = 5  # of the noise that the published loss draws
SHARED = 4  # trained parameters whose gradients are compared, spread over the trunk
FLOAT32_SUM = 1e-5  # two orders of summing a loss


def judge(step: Step, run: Run) -> dict:
    """Fields of the result of the step's `run`; WrongResultError if it computes something else."""
    stage, grads = step.stage, []
    last, eps = len(stage.trained) - 1, torch.finfo(stage.dtype).eps
    parameters = [stage.trained[i * last // (SHARED - 1)] for i in range(SHARED)]
    parameters += step.head.parameters() if step.head else []
    stage.position = 0
    torch.manual_seed(SEED)
    found = run(lambda part: grads.extend(p.grad.clone() for p in parameters) if part == BACKWARD else None)
    stage.position = 0
    batch, plain = stage.next(), stage.copy()
    hidden = plain.get_decoder()(batch.inputs["input_ids"], batch.inputs["attention_mask"]).last_hidden_state
    labels = F.pad(batch.inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    supervised = labels != IGNORE_INDEX
    logits = plain.get_output_embeddings()(hidden[supervised]).float()
    ce, mean, shared = F.cross_entropy(logits, labels[supervised]), 4 * eps / len(logits) ** 0.5, eps / 4
    wanted = [("loss", ce, mean + FLOAT32_SUM)]
    if step.head is not None:
        flow = (_published_flow if step.config == stage.official else _flow)(step, hidden, batch)
        wanted = [("loss", ce + step.config.first_weight * flow, shared + FLOAT32_SUM)]
        wanted += [("cross-entropy", ce, mean + FLOAT32_SUM), ("flow", flow, shared + FLOAT32_SUM)]
    names = ["trunk's gradients"] * SHARED + ["head's gradients"] * (len(parameters) - SHARED)
    exact = torch.autograd.grad(wanted[0][1], parameters)
    wanted += [(name, grad, eps**0.5) for name, grad in zip(names, exact, strict=True)]
    errors = {}
    for (name, right, bound), mine in zip(wanted, found + grads, strict=True):
        error = error_of(name, mine, right, bound)
        errors[name] = max(error, errors.get(name, error), key=lambda e: e["ratio"])
    return dict(errors=errors, worst=max(errors, key=lambda name: errors[name]["ratio"]))


def error_of(name: str, found: Tensor, wanted: Tensor, bound: float) -> dict[str, float | None]:
    """In relative L2, and over its bound. Eager torch has no error of its own: it is what this is relative to."""
    norm = wanted.double().norm().item()
    error = (found.double() - wanted.double()).norm().item() / (norm or 1.0)
    if not error <= bound:
        raise WrongResultError(f"{name} off by {error:.1e}; rounding makes {bound:.1e} at most")
    return dict(ours=error, eager=None, norm=norm, ratio=error / bound)


def _flow(step: Step, hidden: Tensor, batch: Batch) -> Tensor:
    rows = step.targets(batch)
    embeddings = rows.targets if isinstance(rows.targets, Tensor) else step.embed(rows.targets)
    options = dict(seed=batch.index, config=step.config, backend="reference")
    return flow_matching_loss(hidden.float(), step.head, rows, embeddings, **options)


def _published_flow(step: Step, hidden: Tensor, batch: Batch) -> Tensor:
    from sfr_kernels.targets.segments import rows_and_texts

    rows, texts = rows_and_texts(batch.host["labels"], step.config, step.stage.tokenizer)
    rows, n, c, h = rows.to(hidden.device), rows.num_flow, step.config, hidden.flatten(0, 1)
    place, weight = rows.rows[:n], rows.weight[:n]
    made, weights = step.targets(batch)
    if not torch.allclose(weights.flatten(), weight.new_zeros(len(h)).index_copy(0, place, weight), atol=0):
        raise WrongResultError("the published weights are not those of the official preset")
    x_1 = step.embed(texts)[rows.anchor[:n].long()].float()
    torch.manual_seed(SEED)  # as before the step: the noise first, then the times
    x_0 = torch.randn_like(made).flatten(0, 1)[place].float()
    t = torch.rand(len(hidden), dtype=made.dtype, device=made.device)[rows.time_index[:n].long()].float()
    params = {name: p.float() for name, p in step.head.named_parameters()}
    v = reference.velocity(params, x_0.lerp(x_1, t[:, None]), t, h[place].float(), c.time_scale, c.hidden_scale)
    return (weight * (v - (x_1 - x_0)).square().mean(dim=1)).sum() / weight.sum().clamp(min=1.0)
