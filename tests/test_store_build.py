"""Building a store: by any number of processes, killed at any point, on a full disk; always the same bytes."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from corpora import SMALL, HashEncoder, Words, files_of, random_samples, write_labels

from sfr_kernels.commands import main
from sfr_kernels.targets import DamagedStore, OnlineTargets, SampleList, TargetStore, build_targets
from sfr_kernels.training.data import ChatFile

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES = random_samples(12)
TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent


def build(folder, corpus=None, encoder=None, **options) -> TargetStore:
    corpus = corpus or SampleList(SAMPLES, shard_tokens=150)
    return build_targets(corpus, SMALL, Words(), encoder or HashEncoder(), folder=folder, progress=False, **options)


def steps(kill_at: int) -> None:
    """Makes this process kill itself before the file operation number `kill_at`, of those that change the disk."""
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

    for module, names in (
        (os, ("fsync", "replace", "chmod", "mkdir", "unlink", "rmdir")),
        (tempfile, ("mkstemp",)),
        (shutil, ("rmtree",)),
    ):
        for name in names:
            setattr(module, name, counted(getattr(module, name)))


def child(folder: Path, kill_at: int, options: dict) -> None:
    torch.set_num_threads(1)
    steps(kill_at)
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
        process = fork.Process(target=child, args=(folder, kills, options))
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


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    build(tmp_path / "reference")
    import sfr_kernels.atomic as atomic

    written, plain = 0, os.fdopen

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            nonlocal written
            written += len(data)
            if written > 4000:
                self.file.write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    monkeypatch.setattr(atomic.os, "fdopen", lambda handle, mode: Full(plain(handle, mode)))
    with pytest.raises(OSError, match=r"no room left for .*the same command goes on"):
        build(tmp_path / "s")
    monkeypatch.undo()
    kept = files_of(tmp_path / "s")
    shards = [name for name in kept if name.startswith("targets-")]
    assert shards and not any(".partial-" in name for name in kept)
    build(tmp_path / "s")
    assert files_of(tmp_path / "s") == files_of(tmp_path / "reference")


def test_a_small_file_system_fills_and_then_has_room(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with pytest.raises(OSError, match="no room left"):
            build(disk / "s")
        shards = len(list((disk / "s").glob("targets-*")))
        assert shards and not list((disk / "s").glob(".partial-*"))
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        build(disk / "s")
        build(tmp_path / "reference")
        assert files_of(disk / "s") == files_of(tmp_path / "reference")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_readers_while_a_writer_finishes(tmp_path):
    """They see no store, or the whole of it; with a replacement, the old one or the new one."""
    folder, stop, seen = tmp_path / "s", threading.Event(), []
    new, old = build(tmp_path / "n").lookup(range(12)), build(tmp_path / "o", encoder=HashEncoder(salt=1))
    old = old.lookup(range(12))

    def read():
        while not stop.is_set():
            try:
                found = TargetStore.open(folder).lookup(range(12))
            except FileNotFoundError:
                seen.append("none")
            except DamagedStore as error:  # opened just before it was replaced
                assert "is missing" in str(error)
            else:
                assert torch.equal(found, new) or torch.equal(found, old)
                seen.append("new" if torch.equal(found, new) else "old")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    build(folder, encoder=HashEncoder(salt=1))
    build(folder, replace=True)
    while "new" not in seen:
        pass
    stop.set()
    for reader in readers:
        reader.join()
    assert {"none", "old", "new"} <= set(seen) | {"none"}


def test_segments_come_in_order_of_length_and_once(tmp_path):
    encoder = HashEncoder()
    samples = [{"labels": [-100, *range(20)]}, {"labels": [-100, *range(20)]}, {"labels": [-100, 5, 6]}]
    store = build(tmp_path / "s", SampleList(samples), encoder)
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


SCRIPT = """
import sys
sys.path[:0] = [{repository!r}, {tests!r}]
from test_store_build import SAMPLES, SMALL, HashEncoder, SampleList, Words, build
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_builds_the_same_store(tmp_path, processes):
    """Under torchrun, with a gloo group beside it, as a training script has one."""
    build(tmp_path / "reference")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(repository=str(REPOSITORY), tests=str(TESTS)) + f"""
import torch.distributed as dist
dist.init_process_group("gloo")
encoder = HashEncoder()
store = build({str(tmp_path / "s")!r}, encoder=encoder)
assert len(store) == 12
counts = [None] * {processes}
dist.all_gather_object(counts, len(encoder.texts))
assert min(counts) > 0, counts
dist.destroy_process_group()
""")  # fmt: skip
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "s") == files_of(tmp_path / "reference")


@pytest.mark.slow
def test_the_command_under_accelerate_and_ray_builds_what_it_builds_alone(tmp_path):
    pytest.importorskip("ray")
    persons = (REPOSITORY / "sfr_kernels" / "data" / "personas.jsonl").read_text().splitlines(keepends=True)
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(persons[:24]))

    def command(out, *extra):
        return ["targets", "--data", str(data), "--out", str(tmp_path / out), *extra]

    assert main(command("alone")) == 0
    assert main(command("pool", "--devices", "cpu", "cpu")) == 0
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "sfr_kernels"]
    launched = subprocess.run([sys.executable, *launcher, *command("launched")], capture_output=True, text=True,
                              cwd=REPOSITORY)  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(REPOSITORY)}
    ray = subprocess.run([sys.executable, "-m", "sfr_kernels", *command("ray", "--engine", "ray")],
                         capture_output=True, text=True, env=environment)  # fmt: skip
    assert ray.returncode == 0, ray.stderr
    alone = files_of(tmp_path / "alone")
    assert len(alone) == 2 and all(files_of(tmp_path / name) == alone for name in ("pool", "launched", "ray"))


def peak_memory(tmp_path: Path, segments: int) -> int:
    """Bytes a process takes at most while it builds a store of that many segments from a file."""
    data = tmp_path / f"{segments}.jsonl"
    with open(data, "w") as file:
        for i in range(segments // 100):
            file.write('{"labels": [-100' + "".join(f", {(i * 7919 + j) % 50000}" for j in range(200)) + "]}\n")
    script = SCRIPT.format(repository=str(REPOSITORY), tests=str(TESTS)) + f"""
import resource
from sfr_kernels import SFRConfig
from sfr_kernels.targets import build_targets
from sfr_kernels.training.data import ChatFile
config = SFRConfig(stride=2, min_tokens=2, segment_tokens=2)
class Forgetful(HashEncoder):
    def encode_document(self, texts, **options):
        found = super().encode_document(texts, **options)
        self.texts.clear()
        return found
corpus = ChatFile({str(data)!r}, Words(), 4096, shard_tokens=16384)
store = build_targets(corpus, config, Words(), Forgetful(4), folder={str(tmp_path / str(segments))!r}, progress=False)
assert store.manifest["anchors"] == {segments}, store.manifest["anchors"]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """A million segments in the memory of a hundred thousand, but for a record per shard."""
    small, large = peak_memory(tmp_path, 100_000), peak_memory(tmp_path, 1_000_000)
    assert large - small < 16 * 2**20, (small, large)
