"""`SupervisedRows`: which token positions carry loss, and everything the loss needs to know about each of them.

A row is a token position. It carries cross-entropy if its *next* label is supervised, and the flow loss if it has an
anchor: the place in the response from which its target, the embedding of the text ahead, was made. Rows are stored in
the order [flow only | flow and CE | CE only], so that the rows of either loss are one contiguous slice and no kernel
masks or gathers a second time. Everything follows from the labels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import SFRConfig

IGNORE_INDEX = -100
# The fields of a config on which rows depend.
RULES = ("loss", "target_rule", "segment", "segment_tokens", "stride", "min_tokens", "weighting", "time_sampling")


class SupervisedRows:
    """The n supervised rows of a batch of B sequences of L tokens. Build it with `from_labels`. Neither a dataclass nor
    a tuple, since libraries slice, concatenate or cast the tensors that they find in those."""

    rows: Tensor  # (n,) int64, index into the flattened (B·L) tokens
    noise_id: Tensor  # (n,) int64, identity of the row for noise and time
    labels: Tensor  # (n,) int64, class for CE; -100 where the row has no CE
    anchor: Tensor  # (n,) int32, index into the targets; -1 where the row has no flow
    weight: Tensor  # (n,) float32, weight of the row in the flow loss
    time_index: Tensor | None  # (n,) int32, index into the times; None until the times of the step are drawn
    token_row: Tensor  # (B·L,) int32, index into the rows of each token; -1 where it is none
    segments: Tensor  # (A, 2) int64: anchor a's text is labels.flatten()[start:stop] without -100; empty: no text
    shape: tuple[int, int]  # (B, L)
    num_flow: int  # rows[:num_flow] carry the flow loss
    num_ce: int  # rows[n - num_ce:] carry cross-entropy
    targets: Tensor | list[str | None] | None  # (A, d) embeddings, or the A texts to embed; `SFRCollator` adds them
    config: SFRConfig | None  # whose rules they follow

    def __init__(
        self, *, targets: Tensor | list[str | None] | None = None, config: SFRConfig | None = None, **values: Any
    ) -> None:
        values |= dict(targets=targets, config=config)
        for name in type(self).__annotations__:
            setattr(self, name, values.pop(name))
        if values:
            raise TypeError(f"SupervisedRows has no {', '.join(values)}")

    def check_rules(self, config: SFRConfig) -> None:
        """ValueError naming every rule in which a loss's configuration differs from that of the rows."""
        if self.config is None or self.config == config:
            return
        pairs = [(name, getattr(self.config, name), getattr(config, name)) for name in RULES]
        if other := [f"{name}={a!r}, not {b!r}" for name, a, b in pairs if a != b]:
            raise ValueError(f"rows were made by another config than the loss's: {'; '.join(other)}")

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).__annotations__}

    def replace(self, **values: Any) -> "SupervisedRows":
        """A copy with other values."""
        return type(self)(**self._values() | values)

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

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "SupervisedRows":
        return self.replace(**{name: fn(value) for name, value in self._values().items() if isinstance(value, Tensor)})

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "SupervisedRows":
        """The same rows on `device`. By default only a copy to the CPU is synchronous."""
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
        real: Tensor | None = None,  # like labels, 0 or 1: a token at a 0 is padding, and no row
        blank: Tensor | None = None,  # (A,) bool: anchors to drop, since their text is blank
    ) -> "SupervisedRows":
        """The supervised rows of a batch, by the rules of `config`.

        A depends on labels and rules alone: an anchor that is dropped, for a blank text or too few tokens, keeps its
        place with an empty segment.

        Call it on the CPU and move the result with `.to(device)`: on a GPU it works too, but the counts make it wait.
        Raises TypeError or ValueError naming the argument.
        """
        config = SFRConfig() if config is None else config
        labels, segment_ids, noise_id, has_targets, real = _validate(labels, segment_ids, noise_id, has_targets, real)
        batch, length = labels.shape
        flat, device = labels.reshape(-1).long(), labels.device
        following = config.target_rule == "following"

        # together[p]: tokens p and p + 1 belong to the same sample
        together = torch.zeros(batch, length, dtype=torch.bool, device=device)
        next_label = torch.full((batch, length), IGNORE_INDEX, dtype=torch.int64, device=device)
        next_label[:, :-1] = labels[:, 1:]
        if segment_ids is None:
            together[:, :-1] = True
        else:
            torch.eq(segment_ids[:, :-1], segment_ids[:, 1:], out=together[:, :-1])
            next_label.masked_fill_(~together, IGNORE_INDEX)
        together, next_label = together.reshape(-1), next_label.reshape(-1)
        has_ce, own = next_label != IGNORE_INDEX, flat != IGNORE_INDEX
        if real is not None:
            has_ce, own = (x & (real.reshape(-1) != 0) for x in (has_ce, own))

        # Of each row of a response: the response, the row's place i in it, and its size m.
        member = (has_ce if following else own).nonzero().squeeze(1)
        begins = _begins(member, together, following)
        response, start = begins.cumsum(0).sub_(1), begins.nonzero().squeeze(1)
        m = torch.diff(start, append=start.new_full((1,), member.numel()))
        i, size = torch.arange(member.numel(), device=device) - _at(start, response), _at(m, response)
        lacking = None if has_targets is None else _at(has_targets.reshape(-1), _at(member, start)) == 0
        if config.loss == "mtp":
            # Anchors index rows, not segments: that of a row is the next row of its response, whose label is the token
            # two ahead. Anchors of anchors lead to the tokens further ahead.
            anchor = torch.where(i + 1 < size, torch.arange(1, member.numel() + 1, device=device), -1)
            if lacking is not None:
                anchor.masked_fill_(_at(lacking, response), -1)
        else:
            anchor, segments = _anchors(member, start, response, m, i, lacking, blank, config)

        position, ce = member, None  # by the rule "following" every row of a response has CE
        if not following:
            position = (has_ce | own).nonzero().squeeze(1)
            ce, at = _at(has_ce, position), _at(own, position).nonzero().squeeze(1)
            anchor = torch.full_like(position, -1).index_copy_(0, at, anchor)
            i, size = (torch.ones_like(position).index_copy_(0, at, x) for x in (i, size))
        flow = anchor >= 0
        groups = (flow, ~flow) if ce is None else (flow & ~ce, flow & ce, ce & ~flow)
        order = torch.cat([group.nonzero().squeeze(1) for group in groups])
        kept, flow, anchor = _at(position, order), _at(flow, order), _at(anchor, order)
        if config.loss == "mtp":
            inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=device))
            anchor = torch.where(flow, _at(inverse, anchor.clamp(min=0)), -1)
            segments = torch.stack([kept + 1, kept + 2], dim=1)
        token_row = torch.full_like(flat, -1, dtype=torch.int32)
        token_row.scatter_(0, kept, torch.arange(kept.numel(), dtype=torch.int32, device=device))
        identity = torch.arange(flat.numel(), device=device) if noise_id is None else noise_id.reshape(-1)
        weight = torch.where(flow, _at(_weights(i, size, config), order), 0.0)
        time_index = (kept // length).int() if config.time_sampling == "sequence" else None
        return cls(
            rows=kept, noise_id=_at(identity, kept), labels=_at(next_label, kept), anchor=anchor.int(), weight=weight,
            time_index=time_index, token_row=token_row, segments=segments, shape=(batch, length),
            num_flow=int(flow.sum()), num_ce=kept.numel() if ce is None else int(ce.sum()), config=config,
        )  # fmt: skip


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values[index], several times faster on a CPU."""
    return values.index_select(0, index)


def _begins(member: Tensor, together: Tensor, following: bool) -> Tensor:
    """Which members begin a response: a maximal run of positions, or, as published, all members of a packed sample."""
    if following:
        group = member - torch.arange(member.numel(), device=member.device)
    else:
        group = _at((~together).cumsum(0) - (~together).long(), member)
    begins = torch.ones_like(member, dtype=torch.bool)
    torch.ne(group[1:], group[:-1], out=begins[1:])
    return begins


def _anchors(
    member: Tensor,  # (k,) positions of the responses' rows
    start: Tensor,  # (R,) index of each response's first member
    response: Tensor,  # (k,) each member's response
    m: Tensor,  # (R,) number of members of each response
    i: Tensor,  # (k,) each member's place in its response
    lacking: Tensor | None,  # (R,) bool: responses without targets
    blank: Tensor | None,  # (A,) bool, as in `from_labels`
    config: SFRConfig,
) -> tuple[Tensor, Tensor]:
    """The anchor of each row, −1 for none, and the segment (A, 2) of each anchor."""
    following, whole = config.target_rule == "following", config.segment_tokens == 0
    stride, least, reach = config.stride, config.min_tokens, config.segment_tokens
    last = (m - least).clamp_(min=0)  # the row of the last anchor; as published, there are only multiples of the stride
    if whole:
        count = torch.ones_like(m)
    else:
        count = last // stride + 1 + (last % stride != 0) if following else (m + stride - 1) // stride
    if lacking is not None:
        count = count.masked_fill(lacking, 0)
    offset = count.cumsum(0) - count
    of = torch.repeat_interleave(torch.arange(m.numel(), device=m.device), count)  # (A,) the response of each anchor
    row = (torch.arange(of.numel(), device=m.device) - _at(offset, of)) * stride
    if following:
        row = torch.minimum(row, _at(last, of))
    at = _at(start, of) + row  # (A,) each anchor's index among the members
    place = _at(member, at)  # its position
    end = _at(member, _at(start + m - 1, of)) + 1  # after the last member of its response
    begin = place + (following or not whole)
    stop = end + following if whole else torch.minimum(place + 1 + reach, end + following)
    keep = torch.ones_like(of, dtype=torch.bool)
    if not (following or whole):  # enough supervised labels in the segment
        keep = torch.searchsorted(member, stop) - at - 1 >= least
    if blank is not None:
        if blank.shape != keep.shape or blank.dtype != torch.bool:
            raise ValueError(f"blank must be ({len(of)},) bool, one for each anchor, got {tuple(blank.shape)}")
        keep = keep & ~blank.to(keep.device)
    segments = torch.stack([torch.where(keep, x, place) for x in (begin, stop)], dim=1)

    first = _at(offset, response)  # (k,) the first anchor of each row's response
    if following:
        # the next multiple of the stride; rows after the last with enough text ahead have none, row 0 always has one
        wanted = first if whole else first + (i + stride - 1) // stride
        left = keep.nonzero().squeeze(1)
        anchor = _first_of(left, wanted, of, response)
        if not whole:
            anchor = anchor.masked_fill(i > _at(last, response), -1)
    elif whole or stride == 1:
        anchor = first + i * (not whole)  # one for all rows, or one each; a zero target where it was dropped
    else:
        anchor = _nearest(member, place, keep.nonzero().squeeze(1), of, response, first)
    return (anchor if lacking is None else anchor.masked_fill(_at(lacking, response), -1)), segments


def _first_of(left: Tensor, wanted: Tensor, of: Tensor, response: Tensor) -> Tensor:
    """Of the anchors `left`, the first at or after `wanted` in the row's response; −1 where there is none."""
    if left.numel() == of.numel():
        return wanted
    place = torch.searchsorted(left, wanted)
    anchor = _at(torch.cat([left, left.new_full((1,), of.numel())]), place)
    return torch.where(_at(torch.cat([of, of.new_full((1,), -1)]), anchor) == response, anchor, -1)


def _nearest(member: Tensor, place: Tensor, left: Tensor, of: Tensor, response: Tensor, first: Tensor) -> Tensor:
    """Of the anchors `left` in a row's response the nearest, or the earlier of two; where none is left the first, whose
    target is then zero."""
    if left.numel() == 0:
        return first
    place, of = _at(place, left), _at(of, left)
    after = torch.searchsorted(place, member)
    before, after = (after - 1).clamp(min=0), after.clamp(max=left.numel() - 1)
    far = torch.iinfo(torch.int64).max
    back, ahead = (torch.where(_at(of, k) == response, (_at(place, k) - member).abs(), far) for k in (before, after))
    found = _at(left, torch.where(back <= ahead, before, after))
    return torch.where(torch.minimum(back, ahead) < far, found, first)


def _weights(i: Tensor, m: Tensor, config: SFRConfig) -> Tensor:
    if config.weighting == "uniform":
        return torch.ones(i.shape, dtype=torch.float32, device=i.device)
    ahead = (m - i).float()
    return 2 * ahead / (m + 1) if config.weighting == "linear" else ahead / m


def _validate(labels, segment_ids, noise_id, has_targets, real):
    named = dict(labels=labels, segment_ids=segment_ids, noise_id=noise_id, has_targets=has_targets, real=real)
    for name, value in named.items():
        if value is None and name != "labels":
            continue
        if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be an integer tensor, got {getattr(value, 'dtype', type(value).__name__)}")
        if value.shape != labels.shape or value.dim() not in (1, 2):
            shape = "(L,) or (B, L)" if name == "labels" else f"{tuple(labels.shape)} like labels"
            raise ValueError(f"{name} must be {shape}, got {tuple(value.shape)}")
        if value.device != labels.device:
            raise ValueError(f"{name} is on {value.device}, labels on {labels.device}")
    return tuple(v if v is None or v.dim() == 2 else v.unsqueeze(0) for v in named.values())
