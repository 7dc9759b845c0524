"""Building a store: by any number of processes, killed at any point, on a full disk; always the same bytes."""

import errno
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import corpora
import pytest
import torch
from corpora import HashEncoder, Words, files_of, random_samples, write_labels

from sfr_kernels.commands import main
from sfr_kernels.targets import DamagedStore, OnlineTargets, SampleList, TargetStore
from sfr_kernels.training.data import ChatFile

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES = random_samples(12)
TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent


CORPUS = SampleList(SAMPLES, shard_tokens=150)


def build(folder, corpus=CORPUS, **options) -> TargetStore:
    return corpora.build(folder, corpus, **options)


def build_until(kill_at: int, folder: Path, options: dict) -> None:
    """Builds in this process, which kills itself before the file operation of that number that changes the disk."""
    torch.set_num_threads(1)
    done, me = 0, os.getpid()

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal done
            if os.getpid() != me:  # the process that reads ahead
                return function(*args, **kwargs)
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return function(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace", "chmod", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    tempfile.mkstemp, shutil.rmtree = counted(tempfile.mkstemp), counted(shutil.rmtree)
    build(folder, **options)


@pytest.mark.parametrize("kind", ["fresh", "replacing", "repairing"])
def test_killed_before_any_step_it_goes_on_and_ends_with_the_same_bytes(tmp_path, kind):
    reference, folder = tmp_path / "reference", tmp_path / "s"
    wanted = build(reference).lookup(range(12))
    options = {"fresh": {}, "replacing": {"replace": True}, "repairing": {"verify": True}}[kind]
    kills, fork = 0, multiprocessing.get_context("fork")
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        old = None
        if kind == "replacing":
            old = build(folder, encoder=HashEncoder(salt=1)).lookup(range(12))
        elif kind == "repairing":
            build(folder)
            path = TargetStore.open(folder).shards[1].path
            path.write_bytes(path.read_bytes()[:-1] + b"!")
        process = fork.Process(target=build_until, args=(kills, folder, options))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        try:
            found = TargetStore.open(folder).lookup(range(12))
            assert torch.equal(found, wanted) or (old is not None and torch.equal(found, old))
        except (FileNotFoundError, DamagedStore):
            assert old is None  # it was there, and stays until it is replaced
        present = [p for p in folder.glob("targets-*") if (reference / p.name).exists()]
        finished = [p for p in present if p.read_bytes() == (reference / p.name).read_bytes()]
        assert set(present) - set(finished) <= ({path} if kind == "repairing" else set())
        finished = {p: p.stat().st_mtime_ns for p in finished}
        records = len(list(folder.glob(".building-*/0*.json")))
        encoder = HashEncoder()
        build(folder, encoder=encoder, **options)
        kept = [p for p, t in finished.items() if p.stat().st_mtime_ns == t]
        assert len(kept) >= records  # no finished shard was made again
        assert files_of(folder) == files_of(reference)
        if process.exitcode == 0:
            break
        kills += 1
    assert kills > {"fresh": 30, "replacing": 30, "repairing": 10}[kind]


def test_a_disk_that_is_full_at_any_write_loses_nothing(tmp_path, monkeypatch):
    build(tmp_path / "reference")
    sync, writes = os.fsync, 0
    while True:
        left, folder = iter(range(writes)), tmp_path / str(writes)

        def full(handle, left=left, folder=folder):
            if stat.S_ISREG(os.fstat(handle).st_mode) and next(left, None) is None:
                assert not (folder / "manifest.json").exists()  # of which a reader would see the half
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                build(folder)
                break
            except OSError as error:
                assert "no room left for" in str(error) and (writes or "the same command goes on" in str(error))
        kept = files_of(folder)
        assert "manifest.json" not in kept and not any(".partial-" in name for name in kept)
        build(folder)
        assert files_of(folder) == files_of(tmp_path / "reference")
        writes += 1
    assert writes == 10  # a shard and its record, four times; what is replaced; the manifest


def test_readers_while_a_writer_finishes_and_replaces(tmp_path, monkeypatch):
    """Before every step of the writer they see no store, then the whole of the old one, then of the new one."""
    folder, seen = tmp_path / "s", []
    new, old = (build(tmp_path / str(i), encoder=HashEncoder(salt=i)).lookup(range(12)) for i in range(2))

    def watched(function):
        def wrapper(*args, **kwargs):
            try:
                found = TargetStore.open(folder).lookup(range(12))
                seen.append("new" if torch.equal(found, new) else "old" if torch.equal(found, old) else "neither")
            except FileNotFoundError:
                seen.append("none")
            return function(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    opened = build(folder, encoder=HashEncoder(salt=1))
    mapped = TargetStore.open(folder)
    mapped.lookup(range(12))
    build(folder, replace=True)
    order = ["none", "old", "new"]
    assert {*seen} == {*order} and seen == sorted(seen, key=order.index)
    assert torch.equal(mapped.lookup(range(12)), old)
    with pytest.raises(DamagedStore, match="is missing"):
        opened.lookup(range(12))


def test_an_encoder_that_fails_leaves_the_store_it_was_to_replace(tmp_path):
    build(tmp_path / "s")
    before, encoder, working = files_of(tmp_path / "s"), HashEncoder(salt=1), HashEncoder(salt=1)

    def embed(texts):
        if len(encoder.texts) > 60:  # after the first shards
            raise RuntimeError("out of memory")
        return working.embed(texts)

    encoder.embed = embed
    with pytest.raises(RuntimeError, match="out of memory"):
        build(tmp_path / "s", encoder=encoder, replace=True, batch_size=2)
    assert before.items() < files_of(tmp_path / "s").items()  # and shards of the new one


def test_segments_come_in_order_of_length_and_once(tmp_path):
    encoder = HashEncoder()
    samples = [{"labels": [-100, *range(20)]}, {"labels": [-100, *range(20)]}, {"labels": [-100, 5, 6]}]
    store = build(tmp_path / "s", SampleList(samples), encoder=encoder)
    lengths = [len(text) for text in encoder.texts]
    assert lengths == sorted(lengths, reverse=True) and len(set(encoder.texts)) == len(encoder.texts)
    assert torch.equal(store.lookup([0]), store.lookup([1]))


def test_an_encoder_that_returns_nan_is_told_of_which_sample(tmp_path):
    class Broken(HashEncoder):
        def encode_document(self, texts, **options):
            found = super().encode_document(texts, **options)
            found[[i for i, text in enumerate(texts) if "word777" in text]] = float("nan")
            return found

    samples = [*SAMPLES, {"labels": [-100, 5, 777, 6]}, *SAMPLES]
    with pytest.raises(ValueError, match=r"NaN or infinite values for a text of sample 12: 'word5 word777 word6'"):
        build(tmp_path / "s", SampleList(samples, shard_tokens=150), encoder=Broken())
    with pytest.raises(ValueError, match="NaN or infinite values for 'word777'"):
        OnlineTargets(Broken(), Words()).start(["word1", "word777"], "cpu").wait()


def test_a_bad_line_is_named_wherever_it_is(tmp_path):
    path = write_labels(tmp_path / "data.jsonl", SAMPLES)
    with open(path, "a") as file:
        file.write('{"labels": [1, "two"]}\n')
    with pytest.raises(ValueError, match=r'data\.jsonl:13: "labels" must be a list of integers'):
        build(tmp_path / "s", ChatFile(path, Words(), 100, shard_tokens=20))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ChatFile(tmp_path / "absent", Words(), 100)


def test_a_file_gives_the_targets_of_its_samples(tmp_path):
    path = write_labels(tmp_path / "data.jsonl", SAMPLES)
    corpus = ChatFile(path, Words(), 100, shard_tokens=50)
    assert len(corpus.cu_samples) > 4
    assert torch.equal(build(tmp_path / "f", corpus).lookup(range(12)), build(tmp_path / "s").lookup(range(12)))


def run_script(*lines: str, launcher: tuple[str, ...] = (), folder: Path) -> str:
    """What a script says that sees this module's names."""
    path = f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}, {str(TESTS)!r}]"
    (folder / "script.py").write_text("\n".join([path, "from test_store_build import *", *lines]))
    done = subprocess.run([sys.executable, *launcher, str(folder / "script.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_any_number_of_processes_builds_the_same_store(tmp_path):
    """Under torchrun, with a gloo group beside it, as a training script has one."""
    build(tmp_path / "reference")
    run_script(
        "import torch.distributed as dist",
        "dist.init_process_group('gloo')",
        "encoder, counts = HashEncoder(), [None] * 3",
        f"assert len(build({str(tmp_path / 's')!r}, encoder=encoder)) == 12",
        "dist.all_gather_object(counts, len(encoder.texts))",
        "assert min(counts) > 0, counts",
        "dist.destroy_process_group()",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"), folder=tmp_path,
    )  # fmt: skip
    assert files_of(tmp_path / "s") == files_of(tmp_path / "reference")


@pytest.mark.slow
@pytest.mark.long
def test_the_command_under_accelerate_and_ray_builds_what_it_builds_alone(tmp_path):
    pytest.importorskip("ray")
    persons = (REPOSITORY / "sfr_kernels" / "data" / "personas.jsonl").read_text().splitlines(keepends=True)
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(persons[:24]))

    def command(out, *extra):
        return ["targets", "--data", str(data), "--out", str(tmp_path / out), *extra]

    assert main(command("alone")) == 0
    assert main(command("pool", "--devices", "cpu", "cpu")) == 0
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(REPOSITORY)}
    for before, arguments in ((launcher, command("launched")), ([], command("ray", "--engine", "ray"))):
        run = [sys.executable, "-m", *before, "sfr_kernels", *arguments]
        done = subprocess.run(run, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    alone = files_of(tmp_path / "alone")
    assert len(alone) == 2 and all(files_of(tmp_path / name) == alone for name in ("pool", "launched", "ray"))


def peak_memory(tmp_path: Path, segments: int) -> int:
    """Bytes a process takes at most while it builds a store of that many segments from a file."""
    data = tmp_path / f"{segments}.jsonl"
    with open(data, "w") as file:
        for i in range(segments // 100):
            file.write('{"labels": [-100' + "".join(f", {(i * 7919 + j) % 50000}" for j in range(200)) + "]}\n")
    return 1024 * int(run_script(
        "import collections, resource",
        "from sfr_kernels import SFRConfig",
        "encoder = HashEncoder(4)",
        "encoder.texts = collections.deque(maxlen=0)",  # which forgets
        f"corpus = ChatFile({str(data)!r}, Words(), 4096, shard_tokens=16384)",
        "config = SFRConfig(stride=2, min_tokens=2, segment_tokens=2)",
        f"store = build({str(tmp_path / str(segments))!r}, corpus, config=config, encoder=encoder)",
        f"assert store.manifest['anchors'] == {segments}, store.manifest['anchors']",
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)",
        folder=tmp_path,
    ))  # fmt: skip


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Half a million segments in the memory of fifty thousand, but for a record per shard."""
    small, large = peak_memory(tmp_path, 50_000), peak_memory(tmp_path, 500_000)
    assert large - small < 16 * 2**20, (small, large)
