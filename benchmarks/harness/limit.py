"""The limit of an op: its matrix products through cuBLAS, then a copy of the bytes that must move besides.

Who multiplies with cuBLAS can hardly be faster: what his kernels do between two products reads and writes these bytes,
at best as fast as a copy does, unless they are so few that they stay in L2. Both are timed in the run of what they
bound. Bytes, per op, by the rows n of N tokens that carry loss (s bytes a number):

    gather, scatter     h read and written, dh read, dh of all N tokens written                 s (3 n H + N H)
                        (none where n is nearly N: to multiply all of them would cost less)
    cross-entropy       logits read, their gradients written                                    s 2 n V
    path, loss          x_t written; v read, dv written                                         s 3 n d
    first layer         y read, a written; da and y read, dy written                            s 5 n D
    every block         the same, and a read for the residual sum                               s 6 n D
"""

import torch

from .floor import Floor
from .timing import Candidate
from .work import LIMIT, PRODUCTS

NEARLY_ALL = 0.95
ROOM = 512 * 2**20  # most bytes of a copy's source, and of its target: far more than any L2


def gather_bytes(n: int, tokens: int, hidden_size: int, itemsize: int) -> int:
    return 0 if n > NEARLY_ALL * tokens else itemsize * hidden_size * (3 * n + tokens)


def softmax_bytes(n: int, vocab: int, itemsize: int) -> int:
    return 2 * itemsize * n * vocab


def head_bytes(n: int, width: int, num_layers: int, itemsize: int) -> int:
    """Of the head alone, given x_t and dv."""
    return itemsize * n * width * (5 + 6 * (num_layers - 2))


def flow_bytes(n: int, target_size: int, width: int, num_layers: int, itemsize: int) -> int:
    return head_bytes(n, width, num_layers, itemsize) + 3 * itemsize * n * target_size


class Copy:
    """Moves so many bytes: half of them read, half written."""

    def __init__(self, size: int, device: torch.device):
        half = size // 2
        self.bytes = 2 * half
        self.times, self.rest = divmod(half, ROOM)
        self.source, self.target = (
            torch.randint(256, (min(half, ROOM),), dtype=torch.uint8, device=device) for _ in range(2)
        )

    def __call__(self) -> None:
        for _ in range(self.times):
            self.target.copy_(self.source)
        if self.rest:
            self.target[: self.rest].copy_(self.source[: self.rest])


def bounds(floor: Floor | None, size: int, device: torch.device) -> dict[str, Candidate]:
    """What to time beside the providers of a case: its products alone, if it has any, and its limit."""
    copy = Copy(size, device)
    if floor is None:
        return {LIMIT: Candidate(copy)}

    def limit() -> None:
        floor.run()
        copy()

    return {PRODUCTS: Candidate(floor.run), LIMIT: Candidate(limit)}
