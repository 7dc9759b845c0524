"""Work of the losses: judged as a `Problem` is, bounded by its matrix products and by what lies between them.

Ours may err 1.5 times as much as eager torch does in the same dtype, in the loss and in each gradient, against float64
(`errors`). A peer need only compute the same thing: its error is recorded, and a sixteenth is wrong.
"""

from functools import partial

import torch

from sfr_kernels.ops.dispatch import unavailable

from .errors import FACTOR, UPSTREAM, Oracle, outputs_of, peer_verdict, verdict
from .floor import Gemm, cross_entropy_gemms, flow_gemms
from .limit import flow_bytes, gather_bytes, softmax_bytes
from .problems import Problem
from .timing import Graph
from .work import OURS, Run, Work, WrongResultError

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
    judged: dict[str, Run] | None = None,  # of peers that draw noise of their own: the same with the problem's
    factor: float = FACTOR,
) -> Work:
    """The work of a problem, for our backends and these peers."""
    oracle = []

    def judge(provider: str, run: Run) -> dict:
        if not oracle:
            oracle.append(Oracle.of(problem))
        if provider in OURS:
            return verdict(oracle[0].errors(outputs_of(problem, provider), factor))
        return peer_verdict(oracle[0].distance((judged or {}).get(provider, run)(), UPSTREAM))

    return Work(
        run=lambda provider: partial(problem.run, provider) if provider in OURS else peers[provider],
        judge=judge,
        judged=oracle.clear,
        gemms=gemms_of(problem),
        bytes=bytes_of(problem),
        check_graph=partial(check_replay, problem),
        draw=lambda: problem.seed.add_(1),
        weight_bytes=None if problem.weight is None else problem.weight.nbytes,
    )


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
