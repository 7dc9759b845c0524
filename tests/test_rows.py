"""`SupervisedRows.from_labels` against the same rules written slowly, one token at a time."""

import random

import pytest
import torch
from cases import make_labels, small_config
from torch import Tensor

from sfr_kernels import SFRConfig, SupervisedRows

pytestmark = pytest.mark.usefixtures("one_thread")
IGNORE = -100
presets = pytest.mark.parametrize("preset", ["default", "official"])


def slow_responses(labels: list[list[int]], segments: list[list[int]], config: SFRConfig) -> list[list[int]]:
    """The responses as lists of flat positions: maximal runs of the positions of the rule in one packed sample; as
    published, all of them there."""
    published, responses, length = config.target_rule == "published", [], len(labels[0])
    for b, (row, sample) in enumerate(zip(labels, segments, strict=True)):
        if published:
            members = [p for p in range(length) if row[p] != IGNORE]
        else:
            members = [p for p in range(length - 1) if row[p + 1] != IGNORE and sample[p] == sample[p + 1]]
        previous = None
        for p in members:
            if previous is None or sample[p] != sample[previous] or not (published or previous == p - 1):
                responses.append([])
            responses[-1].append(b * length + p)
            previous = p
    return responses


def slow_anchors(response: list[int], flat: list[int], config: SFRConfig, blank) -> dict[int, tuple[int, int]]:
    """{position of an anchor: where its text starts and stops in the flattened labels}; no text, no target."""
    m, published = len(response), config.target_rule == "published"
    if config.segment_tokens == 0:
        text = (response[0], response[-1] + 1) if published else (response[0] + 1, response[-1] + 2)
        return {response[0]: text if not blank(flat[slice(*text)]) else (response[0], response[0])}
    anchors = {}
    last = [m - config.min_tokens] if m >= config.min_tokens and not published else []
    for a in sorted({*range(0, m, config.stride), *last}):
        begin = response[a] + 1
        if published:
            ahead = [p for p in response if begin <= p < begin + config.segment_tokens]
            stop = min(begin + config.segment_tokens, response[-1] + 1)
            enough = len(ahead) >= config.min_tokens
        else:
            if a > 0 and m - a < config.min_tokens:
                continue
            stop, enough = begin + min(config.segment_tokens, m - a), True
        used = enough and not blank(flat[begin:stop])
        anchors[response[a]] = (begin, stop) if used else (response[a], response[a])
    return anchors


def slow_rows(labels: list[list[int]], segments, config: SFRConfig, blank=lambda text: False) -> tuple[dict, list]:
    """{flat position: what its row must say}, and where the text of every anchor lies in the flattened labels."""
    length, out, texts = len(labels[0]), {}, []
    flat = [label for row in labels for label in row]
    published = config.target_rule == "published"
    segments = [[0] * length for _ in labels] if segments is None else segments
    for b, (row, sample) in enumerate(zip(labels, segments, strict=True)):
        for p in range(length - 1):
            if row[p + 1] != IGNORE and sample[p] == sample[p + 1]:
                out[b * length + p] = dict(label=row[p + 1], text=None, weight=0.0, sequence=b)
    for response in slow_responses(labels, segments, config):
        m = len(response)
        at = {} if config.loss == "mtp" else slow_anchors(response, flat, config, blank)
        left = {a: text for a, text in at.items() if text[1] > text[0]}
        for i, position in enumerate(response):
            weight = {"linear": 2 * (m - i) / (m + 1), "uniform": 1.0, "linear_decay": (m - i) / m}[config.weighting]
            if config.loss == "mtp":
                chosen = (response[i + 1] + 1, response[i + 1] + 2) if i + 1 < m else None
            elif config.segment_tokens == 0:
                chosen = left.get(response[0], "zero" if published else None)
            elif config.stride == 1 and published:
                chosen = left.get(position, "zero")
            elif published:
                nearest = min(left, key=lambda a, p=position: (abs(a - p), a), default=None)
                chosen = left.get(nearest, "zero")
            else:
                chosen = next((left[a] for a in sorted(left) if a >= position), None)
            if chosen is not None:
                no_ce = dict(label=IGNORE, sequence=position // length)  # where nothing follows, as published
                out.setdefault(position, no_ce).update(text=chosen, weight=weight)
            texts += [(position + 1, position + 2)] if config.loss == "mtp" else []
        texts += at.values()
    return out, texts


def as_slow(rows: SupervisedRows) -> tuple[dict, list]:
    """The same description of the library's rows."""
    texts = [tuple(s) for s in rows.segments.tolist()]
    columns = (rows.rows, rows.labels, rows.anchor, rows.weight)
    shown = [*(text if text[1] > text[0] else "zero" for text in texts), None]
    out = {
        position: dict(label=label, text=shown[anchor], weight=weight, sequence=position // rows.shape[1])
        for position, label, anchor, weight in zip(*(c.tolist() for c in columns), strict=True)
    }
    return out, texts


def check(labels: Tensor, config: SFRConfig, segments: Tensor | None = None, blank=None) -> SupervisedRows:
    """blank: of the labels of a segment, whether they are no text."""
    rows = SupervisedRows.from_labels(labels, config, segments)
    if blank is not None:
        flat = labels.flatten().tolist()
        found = [stop > start and blank(flat[start:stop]) for start, stop in rows.segments.tolist()]
        rows = SupervisedRows.from_labels(labels, config, segments, blank=torch.tensor(found, dtype=torch.bool))
    packed = None if segments is None else segments.tolist()
    expected, texts = slow_rows(labels.tolist(), packed, config, *filter(None, [blank]))
    ours, our_texts = as_slow(rows)
    assert ours.keys() == expected.keys() and len(rows) == len(expected)
    for position, row in expected.items():
        assert ours[position] | {"weight": None} == row | {"weight": None}, position
        assert ours[position]["weight"] == pytest.approx(row["weight"], rel=1e-6), position
    assert sorted(our_texts) == sorted(texts)
    return rows


def random_batch(seed: int, longest: int = 14) -> tuple[Tensor, Tensor | None]:
    """Runs of supervised and ignored tokens of every length, and packed samples that cut through them."""
    r = random.Random(seed)
    batch, length, keep = r.randint(1, 3), r.randint(1, longest), r.choice([0.3, 0.8, 0.95])
    labels, segments = torch.full((batch, length), IGNORE), torch.zeros(batch, length, dtype=torch.int64)
    for b in range(batch):
        supervised = r.random() < keep
        for p in range(length):
            supervised = supervised if r.random() < 0.75 else r.random() < keep
            labels[b, p] = r.randint(0, 99) if supervised else IGNORE
            segments[b, p] = segments[b, max(p - 1, 0)] + (r.random() < 0.15)
    return labels, segments if r.random() < 0.7 else None


CONFIGS = {
    "default": small_config(),
    "official": small_config("official"),
    "default, real lengths": SFRConfig(),  # every response here is shorter than min_tokens
    "official, real lengths": SFRConfig.official(),
    "whole response": small_config(segment_tokens=0, weighting="uniform"),
    "whole response, official": small_config("official", segment_tokens=0),
    "stride of one": small_config(stride=1, min_tokens=1, segment_tokens=1),
    "stride even": small_config("official", stride=4),  # a tie between two anchors at row 2
    "stride of one, official": small_config("official", stride=1),  # its own or none
    "stride beyond the response": small_config(stride=50, min_tokens=3),
    "no shortest text": small_config(stride=4, min_tokens=1, weighting="uniform"),
    "mtp": small_config(loss="mtp"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_random_patterns(config):
    for seed in range(60):
        labels, segments = random_batch(seed)
        check(labels, config, segments)
        if config.loss != "mtp":
            check(labels, config, segments, blank=lambda text: all(label < 45 for label in text))


def one_response(m: int, before: int = 3, after: int = 2) -> Tensor:
    """A sequence with one response of m rows, under either row rule."""
    return torch.tensor([[IGNORE] * before + list(range(1, m + 1)) + [IGNORE] * after])


PICKED = {
    "no rows": torch.full((2, 5), IGNORE),
    "no sequences": torch.zeros(0, 5, dtype=torch.int64),
    "no tokens": torch.zeros(2, 0, dtype=torch.int64),
    "one token, which nothing predicts": torch.tensor([[7]]),
    "one row, shorter than min_tokens": one_response(1),
    "exactly min_tokens": one_response(2),
    "one more than min_tokens": one_response(3),
    "m - min_tokens a multiple of the stride: no extra anchor": one_response(8),
    "m - min_tokens one beyond the stride": one_response(9),
    "the whole row": one_response(9, before=0, after=0),
    "from the first token": one_response(9, before=0),
    "to the last token": one_response(9, after=0),
    "two whole rows, which must not join": torch.arange(18).view(2, 9),
}


@presets
@pytest.mark.parametrize("name", PICKED)
def test_picked_cases(name, preset):
    labels = PICKED[name]
    if labels.numel():
        check(labels, small_config(preset))
    else:
        rows = SupervisedRows.from_labels(labels, small_config(preset))
        assert (len(rows), rows.num_anchors, rows.num_flow, rows.num_ce) == (0, 0, 0, 0)


def test_anchors_of_one_response_by_hand():
    # rows 0 … 9 at flat positions 2 … 11; anchors 0, 3, 6 and 10 − 2 = 8; row 9 has one token ahead: none
    rows = check(one_response(10, after=0), small_config())
    by_position = rows.anchor[rows.rows.argsort()].tolist()
    assert by_position == [0, 1, 1, 1, 2, 2, 2, 3, 3, -1]
    assert rows.segments.tolist() == [[3, 8], [6, 11], [9, 13], [11, 13]]
    # published rule: rows 0 … 9 at 3 … 12, the text after the anchor's own; the last, 9, has none left and falls away
    rows = check(one_response(10, after=0), small_config("official"))
    flow = slice(None, rows.num_flow)
    order = rows.rows[flow].argsort()
    assert rows.anchor[flow][order].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert rows.segments.tolist() == [[4, 9], [7, 12], [10, 13], [12, 12]]
    torch.testing.assert_close(rows.weight[flow][order], torch.arange(10, 0, -1) / 10)


@presets
def test_order_counts_and_dtypes(preset):
    labels, segments = make_labels()
    rows = SupervisedRows.from_labels(labels, small_config(preset), segments)
    has_flow, has_ce = rows.anchor >= 0, rows.labels != IGNORE
    group = torch.where(has_flow & has_ce, 1, torch.where(has_ce, 2, 0))
    assert (has_flow | has_ce).all() and (group.diff() >= 0).all()
    assert group.unique().tolist() == ([1, 2] if preset == "default" else [0, 1, 2])  # the case has every group
    assert all((rows.rows[group == g].diff() > 0).all() for g in (0, 1, 2))  # in the order of the tokens
    assert rows.num_flow == has_flow.sum() and has_flow[: rows.num_flow].all()
    assert rows.num_ce == has_ce.sum() and has_ce[rows.ce_start :].all()
    assert (rows.weight[~has_flow] == 0).all()
    dtypes = dict(rows="int64", noise_id="int64", labels="int64", anchor="int32", weight="float32", segments="int64")
    assert {name: str(getattr(rows, name).dtype) for name in dtypes} == {k: f"torch.{v}" for k, v in dtypes.items()}
    if preset == "official":  # one time a sequence
        assert rows.time_index.dtype == torch.int32 and torch.equal(rows.time_index, (rows.rows // 13).int())
    else:
        assert rows.time_index is None
    assert rows.shape == (4, 13) and rows.num_anchors == len(rows.segments)


@presets
def test_noise_id_is_the_flat_index_or_what_is_given(preset):
    """And what is given is left as it was."""
    labels, segments = make_labels()
    rows = SupervisedRows.from_labels(labels, small_config(preset), segments)
    assert torch.equal(rows.noise_id, rows.rows)
    identity = torch.arange(labels.numel()).view_as(labels) * 2**33 + 5
    before = identity.clone()
    given = SupervisedRows.from_labels(labels, small_config(preset), segments, identity)
    assert torch.equal(given.noise_id, before.flatten()[rows.rows])
    assert torch.equal(given.rows, rows.rows) and torch.equal(given.anchor, rows.anchor)
    assert all(map(torch.equal, (labels, segments, identity), (*make_labels(), before)))


def test_one_sequence_and_other_integer_types():
    labels, segments = make_labels()
    batch = SupervisedRows.from_labels(labels[3:], small_config(), segments[3:])
    for dtype in (torch.int32, torch.int16):
        alone = SupervisedRows.from_labels(labels[3].to(dtype), small_config(), segments[3].to(dtype))
        assert as_slow(alone) == as_slow(batch) and alone.shape == (1, 13) and alone.labels.dtype == torch.int64
    assert as_slow(SupervisedRows.from_labels(labels)) == as_slow(SupervisedRows.from_labels(labels, SFRConfig()))


@presets
def test_to_keeps_everything(preset):
    labels, segments = make_labels()
    rows = SupervisedRows.from_labels(labels, small_config(preset), segments)
    same, elsewhere = rows.to("cpu"), rows.to("meta")
    assert elsewhere.device.type == "meta" and len(elsewhere) == len(rows)
    for name, value in vars(rows).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(same, name), value)
            moved = getattr(elsewhere, name)
            assert (moved.device.type, moved.shape, moved.dtype) == ("meta", value.shape, value.dtype)
        else:
            assert getattr(same, name) == getattr(elsewhere, name) == value


INTEGERS = dict(dtype=torch.int64)
WRONG = [
    (TypeError, "labels", [[1, 2]]),
    (TypeError, "labels", torch.ones(2, 3)),
    (TypeError, "labels", torch.ones(2, 3, dtype=torch.bool)),  # a mask is not labels
    (ValueError, "labels", torch.ones(1, 2, 3, **INTEGERS)),
    (TypeError, "segment_ids", torch.zeros(2, 3)),
    (ValueError, "segment_ids", torch.zeros(3, 2, **INTEGERS)),
    (ValueError, "segment_ids", torch.zeros(2, 3, device="meta", **INTEGERS)),
    (TypeError, "noise_id", [0] * 6),
    (ValueError, "noise_id", torch.zeros(6, **INTEGERS)),
]


@pytest.mark.parametrize("error, name, value", WRONG)
def test_errors_name_the_argument(error, name, value):
    with pytest.raises(error, match=name):
        SupervisedRows.from_labels(**dict(labels=torch.ones(2, 3, **INTEGERS)) | {name: value})
