"""The store on disk: what it keeps, what it compares, and that a damaged file is never a target."""

import json
import pickle
import re
import timeit
from dataclasses import replace

import corpora
import pytest
import torch
from corpora import CONFIG, TARGET, HashEncoder, Words, files_of, random_samples
from torch.utils.data import DataLoader

from sfr_kernels import SFRConfig
from sfr_kernels.targets import DamagedStore, SampleList, TargetStore
from sfr_kernels.targets.segments import segments_of

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES = random_samples(30)
MANY = SampleList(SAMPLES, shard_tokens=200)


def build(folder, samples=MANY, config=CONFIG, **options) -> TargetStore:
    return corpora.build(folder, samples, config, **options)


def wanted(i: int) -> torch.Tensor:
    return HashEncoder().embed(segments_of([SAMPLES[i]], CONFIG, Words()).texts)


@pytest.fixture
def folder(tmp_path):
    """Of a store of MANY, in float16."""
    build(tmp_path / "s")
    return tmp_path / "s"


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_every_sample_has_its_targets(tmp_path, dtype):
    store = build(tmp_path / "s", dtype=dtype)
    assert len(store) == 30 and len(store.shards) == len(MANY.cu_samples) - 1 > 5 and store.target_size == TARGET
    error = {"float32": 0.0, "float16": 2.0**-11, "int8": 0.6 / 127}[dtype]
    for i in range(30):
        found = store.lookup([i])
        assert found.dtype == (torch.float32 if dtype == "float32" else torch.float16)
        torch.testing.assert_close(found.float(), wanted(i), rtol=0, atol=error)
        assert torch.equal(store.positions(i), segments_of([SAMPLES[i]], CONFIG, Words()).positions)
    assert torch.equal(store.lookup([7, -1, 3, 7]), torch.cat([store.lookup([i]) for i in (7, 3, 7)]))
    assert store.lookup([]).shape == store.lookup([-1]).shape == (0, TARGET)
    for i in (30, -2):
        with pytest.raises(IndexError, match=f"sample_id {i} is outside the store's 30 samples"):
            store.lookup([i])


def test_zero_targets_stay_zero(tmp_path):
    config = SFRConfig(stride=4, min_tokens=3, target_rule="published")
    for dtype in ("float16", "int8"):
        store = build(tmp_path / dtype, config=config, dtype=dtype)
        zero = torch.cat([store.positions(i)[:, 0] == store.positions(i)[:, 1] for i in range(30)])
        assert torch.equal(store.blank(range(30)), zero) and store.blank([-1]).shape == (0,)
        norms = store.lookup(range(30)).float().norm(dim=1)
        assert zero.any() and not norms[zero].any() and ((norms[~zero] - 1).abs() < 0.02).all()


def test_what_a_store_was_made_of_is_compared_and_every_difference_named(folder):
    opened = TargetStore.open(folder, CONFIG, tokenizer=Words(), encoder=HashEncoder(), data=MANY.fingerprint)
    assert torch.equal(opened.lookup([3]).float(), wanted(3).half().float())
    other = replace(CONFIG, stride=5, segment_tokens=9)
    cases = {
        "segments.segment_tokens: stored 6, wanted 9; segments.stride: stored 4, wanted 5": dict(config=other),
        "tokenizer: stored": dict(tokenizer=Words("other")),
        "wanted 'HashEncoder'; encoder.weights: stored": dict(encoder=HashEncoder(salt=1)),
        "encoder.target_size: stored 12, wanted 4": dict(encoder=HashEncoder(4)),
        "data.labels: stored": dict(samples=SAMPLES[:-1]),
        "dtype: stored 'float16', wanted 'int8'": dict(dtype="int8"),
        "batch_size: stored 64, wanted 8": dict(batch_size=8),
    }
    before = files_of(folder)
    for message, changed in cases.items():
        with pytest.raises(ValueError, match="were made differently") as caught:
            build(folder, **changed)
        said = str(caught.value)
        assert message in said and "another folder" in said and "build_targets(..., replace=True)" in said
        assert not re.search("[0-9a-f]{9}", said)  # of a hash the beginning is enough
        assert ("cut, masked, tokenized or packed differently)" in said) == ("samples" in changed)
    with pytest.raises(ValueError, match=r"stride: stored 4, wanted 5"):
        opened.check(other)
    assert files_of(folder) == before


def test_a_second_build_reads_no_text(folder):
    tokenizer, encoder = Words(), HashEncoder()
    tokenizer.batch_decode = None
    build(folder, tokenizer=tokenizer, encoder=encoder)
    assert not encoder.texts


def test_a_flipped_byte_is_never_a_target(folder):
    store = TargetStore.open(folder)
    clean, path = [store.lookup([i]) for i in range(30)], store.shards[2].path
    data = path.read_bytes()
    for at in range(0, len(data), 13):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :])
        store = TargetStore.open(folder)
        for i in range(30):
            try:  # what is not refused is right: the byte was another sample's, or padding of the header
                assert torch.equal(store.lookup([i]), clean[i])
            except DamagedStore as error:
                assert path.name in str(error)
        assert store.damaged() == [path]
    path.write_bytes(data)
    assert not TargetStore.open(folder).damaged()


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "other dtype"])
def test_a_shard_that_is_not_what_it_should_be_is_named_and_made_again(folder, damage):
    before, path = files_of(folder), TargetStore.open(folder).shards[1].path
    data = path.read_bytes()
    changed = {"truncated": data[:-9], "longer": data + b"\0", "other dtype": data.replace(b'"F16"', b'"I16"')}
    path.unlink()
    if damage != "missing":
        path.write_bytes(changed[damage])
    store = TargetStore.open(folder)
    with pytest.raises(DamagedStore, match=path.name):
        store.lookup([MANY.cu_samples[1]])
    encoder = HashEncoder()
    build(folder, encoder=encoder, verify=True)
    assert files_of(folder) == before
    assert 0 < len(encoder.texts) < 0.5 * sum(r["anchors"] for r in store.manifest["shards"])  # that shard alone


def test_a_damaged_manifest_is_refused(folder):
    path = folder / "manifest.json"
    text = path.read_text()
    for changed in (text[: len(text) // 2], text.replace('"stride": 4', '"stride": 5'), "[]", ""):
        path.write_text(changed)
        with pytest.raises(DamagedStore, match=r"manifest\.json is damaged"):
            TargetStore.open(folder)
    path.write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="format 1, not 3"):
        TargetStore.open(folder)
    path.write_text(text[:50])
    with pytest.raises(DamagedStore, match="damaged"):
        build(folder)
    build(folder, replace=True)
    assert path.read_text() == text
    path.unlink()
    with pytest.raises(FileNotFoundError, match="there are no targets"):
        TargetStore.open(folder)


def test_a_store_goes_to_other_processes_by_name(folder):
    store = TargetStore.open(folder)
    assert len(pickle.dumps(store)) < 20_000
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.lookup(range(30)), store.lookup(range(30)))
    for start in ("fork", "spawn"):
        loader = DataLoader(range(30), 1, num_workers=2, multiprocessing_context=start, collate_fn=store.lookup)
        assert all(torch.equal(found, store.lookup([i])) for i, found in enumerate(loader))


def test_random_access_takes_microseconds(folder):
    store = TargetStore.open(folder)
    store.lookup(range(30))  # maps and checks
    ids = iter(range(300))
    times = timeit.repeat(lambda: store.lookup([next(ids) % 30]), number=1, repeat=300)
    assert sorted(times)[150] < 100e-6  # some 6 where it was measured; a read of the file takes milliseconds


def test_a_store_in_memory_needs_no_folder():
    store = TargetStore(torch.eye(4), torch.tensor([0, 1, 1, 4]))
    assert torch.equal(store.lookup([2, 0]), torch.eye(4)[[1, 2, 3, 0]])
    assert store.label_hashes([0]) is None
    with pytest.raises(ValueError, match="NaN"):
        TargetStore(torch.full((2, 3), float("nan")), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="cu_anchors"):
        TargetStore(torch.zeros(2, 3), torch.tensor([0, 3]))


def test_stores_under_one_count(tmp_path):
    """Samples that are trained on and samples that are evaluated on, each with a store of its own."""
    train, evaluation = build(tmp_path / "t"), build(tmp_path / "e", SAMPLES[3:9])
    both = TargetStore.concat([train, evaluation])
    assert len(both) == 36 and both.target_size == TARGET
    for i in range(6):
        assert torch.equal(both.lookup([30 + i]), train.lookup([3 + i]))
        assert both.label_hashes([30 + i]) == train.label_hashes([3 + i])
        assert torch.equal(both.positions(30 + i), train.positions(3 + i))
    assert torch.equal(both.lookup([29, 30, -1]), train.lookup([29, 3]))
    with pytest.raises(IndexError, match="36 samples"):
        both.lookup([36])
    other = replace(CONFIG, stride=5)
    with pytest.raises(ValueError, match=r"segments\.stride: stored 4, wanted 5"):
        both.check(other)
    with pytest.raises(ValueError, match=r"segments\.stride"):
        TargetStore.concat([train, build(tmp_path / "o", config=other)])
    memory = TargetStore(torch.eye(4), torch.tensor([0, 4]))
    for stores in ([train, memory], []):
        with pytest.raises(ValueError, match="one target size"):
            TargetStore.concat(stores)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ({"train": SAMPLES, "test": SAMPLES[:2]}, "one data set, got dict of train, test"),
        (iter(SAMPLES), "a stream has no sample_id"),
        ("chats.jsonl", "got str: a stream has no sample_id. Give a list or a map-style data set, or a file to"),
        ([{"input_ids": [1, 2], "completion_mask": [0, 1]}], "no 'labels', only input_ids, completion_mask"),
    ],
)
def test_what_is_no_list_of_samples_is_refused_with_what_to_do(tmp_path, samples, words):
    with pytest.raises((TypeError, ValueError), match=words):
        build(tmp_path / "s", samples)


def test_bytes_per_supervised_token(tmp_path):
    """At d = 1024 and the default stride 64 bytes a token in float16, 10 with int8 and 256 coordinates."""
    samples = [{"labels": [-100, *range(4096)]} for _ in range(4)]
    for size, dtype, most in ((1024, "float16", 64 * 1.02), (256, "int8", 10)):
        store = build(tmp_path / dtype, samples, SFRConfig(), encoder=HashEncoder(size), dtype=dtype)
        assert sum(r["bytes"] for r in store.manifest["shards"]) / (4 * 4096) < most
