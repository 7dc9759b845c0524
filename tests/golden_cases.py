"""The golden files as tensors: what the published code gave, and how each of our backends is asked for the same."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from sfr_kernels import SFRConfig, SupervisedRows, VelocityHead

FOLDER = Path(__file__).parent / "golden"
IGNORE = -100


def _read(name: str, of: str) -> list[dict]:
    return json.loads((FOLDER / f"{name}.json").read_text())[of]


HEADS = _read("head", "heads")
LOSSES = {case["loss"]: case for case in _read("loss", "cases")}
TARGETS = _read("targets", "cases")
KINDS = {"flow_matching": "flow"}  # what a loss is called here, where that is another name


def tensors(values: dict, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}


def make_head(case: dict, dtype: torch.dtype = torch.float64) -> VelocityHead:
    """The published state dict in a head of ours."""
    state = tensors(case["state"])
    width, size = len(state["input_proj.0.bias"]), len(state["output_proj.bias"])
    blocks = sum(name.endswith("linear.bias") for name in state)
    config = SFRConfig.official(width=width, num_layers=blocks + 2)
    hidden_size = state["input_proj.0.weight"].shape[1] - 2 * size
    head = VelocityHead.from_config(config, hidden_size, size).to(dtype)
    head.load_state_dict(state, strict=True)
    return head


def labels_of(case: dict) -> Tensor:  # (B, L)
    """Every supervised label says where it stands: position + 1000 · sequence."""
    labels = torch.full((len(case["supervised"]), case["length"]), IGNORE)
    for b, runs in enumerate(case["supervised"]):
        for start, stop in runs:
            labels[b, start:stop] = 1000 * b + torch.arange(start, stop)
    return labels


def _embedding(case: dict, labels: Tensor, span: list[int]) -> list[float]:
    """Of the text there, which the file calls by its first and last label; zero where there is none."""
    text = [label for label in labels.flatten()[slice(*span)].tolist() if label != IGNORE]
    size = len(case["state"]["output_proj.bias"])
    return case["embeddings"][f"{text[0]}-{text[-1]}"] if text else [0.0] * size


def loss_problem(name: str, dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    """What the public functions take, and what they are to give."""
    case = LOSSES[name]
    loss = KINDS.get(name, name)
    config = SFRConfig.official(loss=loss, segment_tokens=case["segment_tokens"], stride=case["stride"])
    labels = labels_of(case)
    rows = SupervisedRows.from_labels(labels, config)
    targets = case["targets"] if loss == "cka" else [_embedding(case, labels, span) for span in rows.segments.tolist()]
    head = None if loss == "cka" else make_head(case, dtype)
    times, x_0 = (torch.tensor(case[x], dtype=torch.float64) if x in case else None for x in ("t", "x_0"))
    return SimpleNamespace(
        config=config, rows=rows, labels=labels, head=head, times=times, x_0=x_0,
        hidden=torch.tensor(case["h"], dtype=dtype).requires_grad_(),
        targets=torch.tensor(targets, dtype=torch.float64),
        # the published CKA is float32 throughout, and its sums cancel to a tenth
        tolerance=1e-4 if loss == "cka" else 1e-6,
        wanted=tensors(dict(value=case["value"], hidden=case["dh"]) | case.get("grads", {})),
    )  # fmt: skip


def evaluate_head(head: nn.Module, case: dict, dtype: torch.dtype, device="cpu", velocity=None) -> dict[str, Tensor]:
    """The velocity and every gradient as they come out of `head`, or of `velocity` with its parameters, named as
    `wanted_of_head` names them."""
    x = {name: torch.tensor(case[name], dtype=dtype, device=device) for name in ("x_t", "t", "h", "upstream")}
    hidden = x["h"].flatten(0, 1).requires_grad_()
    t = x["t"].repeat_interleave(x["h"].shape[1])
    head = head.to(device, dtype)
    v = (velocity or head)(x["x_t"].flatten(0, 1), t, hidden)
    grads = torch.autograd.grad(v, [hidden, *head.parameters()], x["upstream"].flatten(0, 1))
    return dict(zip(["v", "hidden", *dict(head.named_parameters())], [v.detach(), *grads], strict=True))


def wanted_of_head(case: dict) -> dict[str, Tensor]:
    wanted = tensors(dict(v=case["v"], hidden=case["dh"]) | case["grads"])
    return wanted | {name: wanted[name].flatten(0, 1) for name in ("v", "hidden")}


def evaluate_loss(problem: SimpleNamespace, loss: Tensor) -> dict[str, Tensor]:
    """The value and every gradient, named as in `problem.wanted`."""
    leaves = dict(hidden=problem.hidden) | (dict(problem.head.named_parameters()) if problem.head else {})
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(value=loss.detach()) | dict(zip(leaves, grads, strict=True))


def assert_golden(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """In relative L2, of every tensor by itself."""
    assert found.keys() == wanted.keys()
    for name, exact in wanted.items():
        mine = found[name].detach().cpu().double()
        assert mine.shape == exact.shape, name
        error, norm = (mine - exact).norm().item(), exact.norm().item()
        assert error <= tolerance * norm, f"{name}: off by {error / max(norm, 1e-300):.1e}, at most {tolerance:.1e}"


class Numbers:
    """A tokenizer that writes labels as numbers, and as nothing where they are blank; and an encoder whose embedding of
    a text is what the file knows it by: first label, last label, and their count."""

    def __init__(self, blank: list[int]):
        self.blank = set(blank)

    def batch_decode(self, pieces: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join("" if label in self.blank else str(label) for label in piece) for piece in pieces]

    def get_embedding_dimension(self) -> int:
        return 3

    def encode(self, texts: list[str], **options) -> Tensor:
        labels = [[int(word) for word in text.split()] for text in texts]
        return torch.tensor([[text[0], text[-1], len(text)] for text in labels], dtype=torch.float64)
