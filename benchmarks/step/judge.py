"""What a training step must compute before it is timed.

Each step's loss is compared with a plain copy of the model under HF's loss, plus the reference's flow loss on the
same hidden states, targets, noise and times; and the gradients of some of the trained parameters, and of the step's own
head, with those of that sum. The published steps' rows, weights and texts are those of `SFRConfig.official()`.

The trunk is the same for all and computes the same bits, so losses differ by the rounding of logits and velocities
alone. A loss is a mean over n rows, whose errors of a few ε each (ε of the dtype) average out: it may be off by
4 ε / √n; the flow loss, whose rows share the rounding of the head's parameters, by ε / 4. A gradient has come back
through every layer in that dtype: it may be off by √ε, in relative L2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sfr_kernels import SupervisedRows, flow_matching_loss, reference
from sfr_kernels.rows import IGNORE_INDEX

from ..harness.work import Run, WrongResultError
from ..peers.published_targets import SuffixTargets
from .data import Batch
from .providers import OursStored, Published, Stage, Step

SEED = 5  # of the noise that the published loss draws
SHARED = 4  # trained parameters whose gradients are compared, spread over the trunk
LOGITS = 2**26  # that the reference makes at a time
FLOAT32_SUM = 1e-5  # two orders of summing a loss


class Judge:
    def __init__(self, stage: Stage):
        self.stage = stage
        self.plain = Step(stage, stage.copy())
        count = len(stage.trained)
        self.shared = [stage.trained[i * (count - 1) // (SHARED - 1)] for i in range(SHARED)]

    def __call__(self, step: Step, run: Run) -> dict:
        """Fields of the result; WrongResultError if the step computes something else."""
        batches = self.stage.batches
        batches.position = 0
        torch.manual_seed(SEED)
        found = [t.detach() for t in run()]  # what is timed
        batches.position = 0
        batch = batches.next()
        targets = step.targets(batch)
        if isinstance(step, Published):
            self._check_places(step, batch, targets)
        parameters = self.shared + ([] if step.head is None else list(step.head.parameters()))
        torch.manual_seed(SEED)
        grads = torch.autograd.grad(step.loss(batch, targets)[0], parameters)
        wanted, wanted_grads = self._wanted(step, batch, targets, parameters)
        errors = self._errors(found, wanted) | self._gradient_errors(grads, wanted_grads)
        return dict(errors=errors, worst=max(errors, key=lambda name: errors[name]["ratio"]))

    def _wanted(
        self, step: Step, batch: Batch, targets: object, parameters: list[Tensor]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """[loss, L_CE, L_flow], or [loss], and the gradient of every parameter."""
        seen = []
        hook = self.plain.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            ce = self.plain.loss(batch, None)[0]
        finally:
            hook.remove()
        (hidden,) = seen
        if step.config is None:
            grads = torch.autograd.grad(ce, parameters)
            # HF's own loss has to be judged by something else
            return [self._reference_ce(hidden.detach(), batch)], grads
        flow = _reference_flow(step, hidden, batch, targets)
        loss = ce + step.config.flow_weight * flow
        return [loss.detach(), ce.detach(), flow.detach()], torch.autograd.grad(loss, parameters)

    @torch.no_grad()
    def _reference_ce(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The mean over the supervised rows, float32."""
        lm_head, labels = self.plain.lm_head, F.pad(batch.inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        used = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        total = 0.0
        for some in used.split(max(1, LOGITS // lm_head.out_features)):
            logits = lm_head(hidden.flatten(0, 1)[some]).float()
            total = total + F.cross_entropy(logits, labels[some], reduction="sum")
        return total / len(used)

    def _errors(self, found: list[Tensor], wanted: list[Tensor]) -> dict[str, dict]:
        eps, shape = torch.finfo(self.stage.dtype).eps, self.stage.shape
        mean = 4 * eps / (shape.supervised * shape.tokens) ** 0.5 + FLOAT32_SUM
        flow = eps / 4 + FLOAT32_SUM
        bounds = {"loss": mean if len(wanted) == 1 else flow, "cross-entropy": mean, "flow": flow}
        if len(found) != len(wanted):
            raise WrongResultError(f"the step returned {len(found)} losses, not {len(wanted)}")
        names = list(bounds)[: len(wanted)]
        return {n: _error(n, a, b, bounds[n]) for n, a, b in zip(names, found, wanted, strict=True)}

    def _gradient_errors(self, found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> dict[str, dict]:
        bound = torch.finfo(self.stage.dtype).eps ** 0.5
        groups = {"trunk's gradients": slice(0, SHARED), "head's gradients": slice(SHARED, None)}
        errors = {}
        for name, part in groups.items():
            pairs = zip(found[part], wanted[part], strict=True)
            if all_errors := [_error(name, a, b, bound) for a, b in pairs]:
                errors[name] = max(all_errors, key=lambda error: error["ratio"])
        return errors

    def _check_places(self, step: Published, batch: Batch, targets: tuple[Tensor, Tensor]) -> None:
        """Rows, weights, texts and which text each row has are those of the official preset; with loops, all of it is
        bit for bit what it is without."""
        from sfr_kernels.targets.segments import segment_texts

        labels, rows = batch.host["labels"], _official_rows(step, batch)
        n, index = rows.num_flow, rows.rows[: rows.num_flow]
        anchor = rows.anchor[:n].long()
        anchor = anchor.masked_fill((rows.segments[:, 0] == rows.segments[:, 1])[anchor], -1)  # a zero target
        anchor = torch.full((labels.numel(),), -1).index_copy_(0, index, anchor)
        weight = torch.zeros(labels.numel()).index_copy_(0, index, rows.weight[:n])
        if not torch.allclose(targets[1].cpu().flatten(), weight, rtol=1e-6, atol=0):
            raise WrongResultError("the published weights are not those of the official preset")
        if step.make is None:
            return
        maker = SuffixTargets(step.encoder, self.stage.tokenizer, step.config, self.stage.dtype)
        texts = maker.texts(labels)
        if texts != segment_texts(labels, rows, self.stage.tokenizer, step.config):
            raise WrongResultError("the published texts are not those of the official preset")
        if not torch.equal(maker.places(labels, texts).flatten(), anchor):
            raise WrongResultError("the published anchors are not those of the official preset")
        for made, wanted in zip(targets, maker(batch.inputs["labels"]), strict=True):
            if not torch.equal(made, wanted):
                raise WrongResultError("the loops make other targets than the same without loops")


def _error(name: str, found: Tensor, wanted: Tensor, bound: float) -> dict[str, float | None]:
    """In relative L2, and over its bound. Eager torch has no error of its own: it is what this is relative to."""
    norm = wanted.double().norm().item()
    error = (found.double() - wanted.double()).norm().item() / (norm or 1.0)
    if not error <= bound:
        raise WrongResultError(f"{name} off by {error:.1e}; rounding makes {bound:.1e} at most")
    return dict(ours=error, eager=None, norm=norm, ratio=error / bound)


def _official_rows(step: Published, batch: Batch) -> SupervisedRows:
    return SupervisedRows.from_labels(batch.host["labels"], step.config)


def _reference_flow(step: Step, hidden: Tensor, batch: Batch, targets: object) -> Tensor:
    """L_flow in float32, under autograd in the hidden states and the step's head."""
    if isinstance(step, OursStored):
        options = dict(seed=batch.index, config=step.config, backend="reference")
        return flow_matching_loss(hidden.float(), step.head, targets["rows"], step.embeddings(targets), **options)
    (x_1, _), rows = targets, _official_rows(step, batch).to(hidden.device)
    torch.manual_seed(SEED)  # as before the step: the noise first, then the times
    x_0 = torch.randn_like(x_1)
    t = torch.rand(x_1.shape[0], dtype=x_1.dtype, device=x_1.device)
    n, c = rows.num_flow, step.config
    x_0, x_1, h = (x.flatten(0, 1)[rows.rows[:n]].float() for x in (x_0, x_1, hidden))
    t = t.float()[rows.time_index[:n].long()]
    x_t = (1 - t)[:, None] * x_0 + t[:, None] * x_1
    params = {name: p.float() for name, p in step.head.named_parameters()}
    v = reference.velocity(params, x_t, t, h, c.time_scale, c.hidden_scale)
    row_loss, weight = (v - (x_1 - x_0)).square().mean(dim=1), rows.weight[:n]
    return (weight * row_loss).sum() / weight.sum().clamp(min=1.0)
