"""`SupervisedRows`: which token positions carry loss, and everything the loss needs to know about each of them.

A row is a token position. It carries cross-entropy if its *next* label is supervised, and the flow loss if it has an
anchor: the place in the response from which its target, the embedding of the text ahead, was made. Rows are stored in
the order [flow only | flow and CE | CE only], so that the rows of either loss are one contiguous slice and no kernel
masks or gathers a second time. All of it follows from the labels (DESIGN section 1), with no loop over tokens.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .config import SFRConfig

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class SupervisedRows:
    """The n supervised rows of a batch of B sequences of L tokens. Build it with `from_labels`."""

    rows: Tensor  # (n,) int64, index into the flattened (B·L) tokens
    noise_id: Tensor  # (n,) int64, identity of the row for noise and time
    labels: Tensor  # (n,) int64, class for CE; -100 where the row has no CE
    anchor: Tensor  # (n,) int32, index into the targets; -1 where the row has no flow
    weight: Tensor  # (n,) float32, weight of the row in the flow loss
    time_index: Tensor | None  # (n,) int32, index into the times; None until the times of the step are drawn
    token_row: Tensor  # (B·L,) int32, index into the rows of each token; -1 where it is none
    segments: Tensor  # (A, 2) int64: anchor a's text is labels.flatten()[start:stop]; empty means a zero target
    shape: tuple[int, int]  # (B, L)
    num_flow: int  # rows[:num_flow] carry the flow loss
    num_ce: int  # rows[n - num_ce:] carry cross-entropy

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def num_anchors(self) -> int:
        return self.segments.shape[0]

    @property
    def ce_start(self) -> int:
        return len(self) - self.num_ce

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def _map(self, fn) -> "SupervisedRows":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: fn(v) for k, v in tensors.items() if isinstance(v, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "SupervisedRows":
        """The same rows on `device`. By default only a copy to the CPU waits: it may be read at once."""
        if non_blocking is None:
            non_blocking = torch.device(device).type != "cpu"
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "SupervisedRows":
        return self._map(Tensor.pin_memory)

    @classmethod
    def from_labels(
        cls,
        labels: Tensor,  # (B, L) or (L,) integers, -100 = not supervised
        config: SFRConfig | None = None,
        segment_ids: Tensor | None = None,  # like labels: tokens of one packed sample share a value
        noise_id: Tensor | None = None,  # like labels, int64: identity of each token; default its flat index
        has_targets: Tensor | None = None,  # like labels, 0 or 1: responses that start at a 0 have no flow loss
    ) -> "SupervisedRows":
        """The supervised rows of a batch, by the rules of `config`.

        Call it where the labels are, on the CPU, and move the result with `.to(device)`. On a GPU it works too, but
        has to wait for the counts. Raises TypeError or ValueError naming the argument.
        """
        config = SFRConfig() if config is None else config
        labels, segment_ids, noise_id, has_targets = _validate(labels, segment_ids, noise_id, has_targets)
        batch, length = labels.shape
        flat, device = labels.reshape(-1).long(), labels.device

        # together[p]: tokens p and p + 1 belong to the same sample
        together = torch.zeros(batch, length, dtype=torch.bool, device=device)
        next_label = torch.full((batch, length), IGNORE_INDEX, device=device)
        next_label[:, :-1] = labels[:, 1:]
        if segment_ids is None:
            together[:, :-1] = True
        else:
            torch.eq(segment_ids[:, :-1], segment_ids[:, 1:], out=together[:, :-1])
            next_label.masked_fill_(~together, IGNORE_INDEX)
        together, next_label = together.reshape(-1), next_label.reshape(-1)
        has_ce = next_label != IGNORE_INDEX
        in_response = has_ce if config.row_rule == "next_label" else flat != IGNORE_INDEX

        # Responses: maximal runs. Of each row its response, and its place i among the m rows of that.
        same = config.row_rule == "next_label"  # the rows of CE are those of the responses
        position = (has_ce if same else has_ce | in_response).nonzero().squeeze(1)
        ce = _at(has_ce, position)
        member = ce if same else _at(in_response, position)
        starts = in_response.clone()
        starts[1:] &= ~(in_response & together)[:-1]
        starts = _at(starts, position)
        response = starts.cumsum(0).sub_(1).clamp_(min=0)
        start = starts.nonzero().squeeze(1)
        first = _at(position, start)
        before = start if same else _at(member.cumsum(0), start) - 1
        m = torch.diff(before, append=member.sum()[None])
        i, ahead = position - _at(first, response), _at(m, response)
        local, count = _row_anchors(i, ahead, m, config)
        if has_targets is not None:
            lacking = has_targets.reshape(-1)[first] == 0
            count = count.masked_fill(lacking, 0)
            local = local.masked_fill(_at(lacking, response), -1)
        offset = count.cumsum(0) - count
        flow = (local >= 0) & member
        groups = (flow, ~flow) if same else (flow & ~ce, flow & ce, ce & ~flow)
        order = torch.cat([group.nonzero().squeeze(1) for group in groups])
        kept, flow = _at(position, order), _at(flow, order)
        if config.loss == "mtp":
            # The target of a row is the label of the row mtp_offset - 1 ahead of it: anchors index rows, not segments.
            inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=device))
            ahead_of = (_at(start, response) + local).clamp_(min=0, max=max(order.numel() - 1, 0))
            anchors = _at(_at(inverse, ahead_of), order)
            segments = torch.stack([kept + 1, kept + 2], dim=1)
        else:
            anchors = _at((_at(offset, response) + local).int(), order)
            segments = _segments(m, first, count, offset, config)
        token_row = torch.full_like(flat, -1, dtype=torch.int32)
        token_row.scatter_(0, kept, torch.arange(kept.numel(), dtype=torch.int32, device=device))
        identity = torch.arange(flat.numel(), device=device) if noise_id is None else noise_id.reshape(-1)
        return cls(
            rows=kept,
            noise_id=_at(identity, kept),
            labels=_at(next_label, kept),
            anchor=torch.where(flow, anchors, -1).int(),
            weight=torch.where(flow, _at(_weights(i, ahead, config), order), 0.0),
            time_index=(kept // length).int() if config.time_sampling == "sequence" else None,
            token_row=token_row,
            segments=segments,
            shape=(batch, length),
            num_flow=int(flow.sum()),
            num_ce=int(ce.sum()),
        )


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values[index], several times faster on a CPU."""
    return values.index_select(0, index)


def _row_anchors(i: Tensor, ahead: Tensor, m: Tensor, config: SFRConfig) -> tuple[Tensor, Tensor]:
    """Local anchor (-1 = none) of row i of a response of `ahead` rows; the number of anchors of responses of m rows."""
    stride, least = config.stride, config.min_tokens
    if config.loss == "mtp":
        wanted = i + config.mtp_offset - 1
        return torch.where(wanted < ahead, wanted, -1), m
    if config.segment_tokens == 0:
        return torch.zeros_like(i), torch.ones_like(m)
    if config.anchor_rule == "nearest":
        last = (ahead - 1).div(stride, rounding_mode="floor")
        return torch.minimum((i + (stride - 1) // 2).div_(stride, rounding_mode="floor"), last), (
            m + stride - 1
        ) // stride
    on_grid = (i + stride - 1).div_(stride, rounding_mode="floor")
    # the last row that has enough text ahead; row 0 always counts
    local = torch.where(i <= (ahead - least).clamp_(min=0), on_grid, -1)
    last = (m - least).clamp(min=0)
    return local, last // stride + 1 + (last % stride != 0)


def _segments(m: Tensor, first: Tensor, count: Tensor, offset: Tensor, config: SFRConfig) -> Tensor:
    """Where the text of each anchor starts and stops in the flattened labels: (A, 2)."""
    response = torch.repeat_interleave(torch.arange(m.numel(), device=m.device), count)
    m = m[response]
    row = (torch.arange(response.numel(), device=m.device) - offset[response]) * config.stride
    if config.anchor_rule == "following":
        row = torch.minimum(row, (m - config.min_tokens).clamp(min=0))
    stop = m if config.segment_tokens == 0 else torch.minimum(row + config.segment_tokens, m)
    if config.anchor_rule == "nearest":
        stop = torch.where(m - row < config.min_tokens, row, stop)
    text = first[response] + (config.row_rule == "next_label")
    return torch.stack([text + row, text + stop], dim=1)


def _weights(i: Tensor, m: Tensor, config: SFRConfig) -> Tensor:
    if config.weighting == "uniform":
        return torch.ones(i.shape, device=i.device)
    if config.weighting == "linear":
        return (2.0 * (m - i) / (m + 1)).float()
    return ((m - i) / m).float()


def _validate(labels, segment_ids, noise_id, has_targets):
    named = {"labels": labels, "segment_ids": segment_ids, "noise_id": noise_id, "has_targets": has_targets}
    for name, value in named.items():
        if value is None and name != "labels":
            continue
        if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be an integer tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.shape != labels.shape or value.dim() not in (1, 2):
            raise ValueError(f"{name} must be (B, L) like labels {tuple(labels.shape)}, got {tuple(value.shape)}")
        if value.device != labels.device:
            raise ValueError(f"{name} is on {value.device}, labels on {labels.device}")
    return tuple(v if v is None or v.dim() == 2 else v.unsqueeze(0) for v in named.values())
