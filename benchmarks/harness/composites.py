"""Work of the losses: judged as a `Problem` is, bounded by its matrix products and by what lies between them.

Ours may err 1.5 times as much as eager torch does in the same dtype, in the loss and in each gradient, against float64
(`errors`), at times and with an upstream gradient that make errors show; and the call that is timed must give the same
as float64 to a sixteenth. A peer need only compute the same thing, to a sixteenth: its error is recorded.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sfr_kernels.ops.dispatch import leaves, unavailable
from sfr_kernels.rows import IGNORE_INDEX

from .errors import FACTOR, UPSTREAM, Oracle, peer_verdict, verdict
from .floor import Gemm, cross_entropy_gemms, flow_gemms
from .limit import flow_bytes, gather_bytes, softmax_bytes
from .problems import Problem
from .timing import Graph
from .work import Run, Work, WrongResultError

SMALL_FACTOR = 3.0  # of eager's error, where dW is accumulated in 16 bit: every chunk rounds it once more


def backends(device: torch.device) -> dict[str, str | None]:
    """Ours, and why one of them cannot run here. The torch backend is for where there is no GPU."""
    found = {name: unavailable(name, device) for name in ("triton", "cuda")}
    return found | dict(
        torch="on a GPU it is the others' oracle, not a way to train" if device.type == "cuda" else None
    )


def work_of(
    problem: Problem,
    peers: dict[str, Run],
    *,
    ours: dict[str, Callable[[bool], Tensor]] | None = None,  # beside the backends: (judged) → loss
    judged: dict[str, Run] | None = None,  # of peers that draw noise of their own: with ours, gradients times UPSTREAM
    factor: float = FACTOR,
) -> Work:
    """The work of a problem, for our backends and these peers."""
    oracles: dict[str, Oracle] = {}

    def loss_of(provider: str) -> Callable[[bool], Tensor]:
        return (ours or {}).get(provider) or (lambda judged: problem.loss(provider, judged=judged))

    def run_of(provider: str) -> Run:
        if provider in peers:
            return peers[provider]
        loss = loss_of(provider)
        return lambda: problem.with_gradients(loss(False))

    def judge(provider: str, run: Run) -> dict:
        if not oracles:
            oracles["judged"] = Oracle.of(problem)
        if provider in peers:
            if judged and provider in judged:
                return peer_verdict(oracles["judged"].distance(judged[provider]()))
            return peer_verdict(oracles["judged"].distance(run(), UPSTREAM))
        if "timed" not in oracles:  # at the times that the call draws
            drawn = problem.op != "linear_cross_entropy"
            oracles["timed"] = Oracle.timed(problem) if drawn else oracles["judged"]
        fields = verdict(oracles["judged"].errors(problem.with_gradients(loss_of(provider)(True), UPSTREAM), factor))
        peer_verdict(oracles["timed"].distance(run(), UPSTREAM))
        return fields

    return Work(
        run=run_of,
        judge=judge,
        judged=oracles.clear,
        gemms=gemms_of(problem),
        factors=partial(factors_of, problem),
        bytes=bytes_of(problem),
        check_graph=partial(check_replay, problem),
        draw=lambda: problem.seed.add_(1),
        weight_bytes=None if problem.weight is None else problem.weight.nbytes,
    )


def factors_of(problem: Problem, gemms: list[Gemm]) -> dict[Gemm, tuple[Tensor, Tensor]]:
    """The problem's own tensors, for the products with the lm_head: what a GPU draws for a product, and so its clocks,
    depends on the numbers. Those of the head are drawn (`floor`)."""
    if problem.weight is None:
        return {}
    with torch.no_grad():
        rows = problem.rows.rows[problem.rows.ce_start :] if problem.op == "sfr_loss" else None
        labels = problem.labels.flatten() if rows is None else problem.rows.labels[problem.rows.ce_start :]
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(1) if rows is None else rows
        labels = labels[labels != IGNORE_INDEX]
        h, w = problem.hidden.detach().flatten(0, 1)[rows], problem.weight.detach()
        dlogits = h @ w.T
        weight = torch.full((len(labels),), 1.0 / len(labels), device=h.device)
        leaves("torch").softmax_xent(dlogits, labels, weight)
    logits, dh, *dw = gemms[-2 if problem.shape.frozen else -3 :]
    return {logits: (h, w.T), dh: (dlogits, w)} | ({dw[0]: (dlogits.T, h)} if dw else {})


def gemms_of(problem: Problem) -> list[Gemm]:
    s, found = problem.shape, []
    if problem.head is not None:
        found += flow_gemms(problem.num_flow, s.hidden_size, s.target_size, s.width, s.num_layers)
    if problem.weight is not None:
        found += cross_entropy_gemms(problem.num_ce, s.hidden_size, s.vocab, not s.frozen)
    return found


def bytes_of(problem: Problem) -> int:
    """What must be read or written beside the products (`limit`)."""
    s, size = problem.shape, problem.dtype.itemsize
    n = max(problem.num_ce, problem.num_flow) if problem.weight is not None else problem.num_flow
    found = gather_bytes(n, s.batch * s.length, s.hidden_size, size)
    if problem.weight is not None:
        found += softmax_bytes(problem.num_ce, s.vocab, size)
    if problem.head is not None:
        found += flow_bytes(problem.num_flow, s.target_size, s.width, s.num_layers, size)
    return found


def check_replay(problem: Problem, graph: Graph, run: Run) -> None:
    """A replay is the launched call with the seed that the device holds at that moment."""
    losses = []
    for seed in (11, 12):
        problem.seed.fill_(seed)
        graph.replay()
        losses.append(graph.outputs[0].item())
        for replayed, launched in zip(graph.outputs, run(), strict=True):
            # cuBLAS may choose another kernel under capture: the same up to rounding
            wrong = (replayed.double() - launched.double()).norm() / launched.double().norm().clamp(min=1e-30)
            if not wrong <= 4 * torch.finfo(problem.dtype).eps + 1e-5:
                raise WrongResultError(f"a graph replay differs from the launched call by {wrong:.1e}")
    if losses[0] == losses[1]:
        raise WrongResultError("two replays with different seeds gave the same loss")
