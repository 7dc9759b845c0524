"""The file of answers: a stopped run goes on with it, and one of something else is refused."""

import fcntl
import json

import pytest
from test_generate import PROMPTS, Echo, unused

from sfr_kernels.evaluation.generate import Answer, Sampling, generate, stored


def test_a_run_cut_anywhere_goes_on_to_the_same_file(tmp_path):
    """As a kill leaves it: nothing, a torn header, torn answers. What is whole is not made again."""
    prompts, identity = PROMPTS[:3], {"model": "é", "list": (1, 2)}
    options = dict(sampling=Sampling(2, seed=9), batch_size=4, identity=identity)
    wanted = generate(Echo(), prompts, keep=tmp_path / "deep" / "whole", **options)
    whole = (tmp_path / "deep" / "whole").read_bytes()
    assert [Answer(e["text"], e["finished"]) for e in map(json.loads, whole.splitlines()[1:3])] == wanted[2]
    file = tmp_path / "cut"
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in {*range(0, len(whole), 7), *ends, *(end + 1 for end in ends)}:
        file.write_bytes(whole[:cut])
        engine = Echo()
        assert generate(engine, prompts, keep=file, **options) == wanted
        assert sorted(file.read_bytes().splitlines(True)) == sorted(whole.splitlines(True))
        assert sum(map(len, engine.batches)) == 6 - max(0, whole[:cut].count(b"\n") - 1)


def test_batches_before_an_interruption_are_kept(tmp_path):
    keep = tmp_path / "answers"
    with pytest.raises(KeyboardInterrupt):
        generate(Echo(stop_at=2), PROMPTS, Sampling(2), batch_size=3, keep=keep, identity={})
    assert keep.read_bytes().count(b"\n") == 1 + 6
    seen = []

    class Watching(Echo):
        def answer(self, batch, sampling):
            seen.append(keep.read_bytes().count(b"\n"))  # what a kill would leave
            return super().answer(batch, sampling)

    again, wanted = Watching(), generate(Echo(), PROMPTS, Sampling(2))
    assert generate(lambda: again, PROMPTS, Sampling(2), keep=keep, identity={}, batch_size=3) == wanted
    assert [len(batch) for batch in again.batches] == [3, 1] and seen == [7, 10]


def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path):
    keep = tmp_path / "answers"
    generate(Echo(), PROMPTS, Sampling(1), keep=keep, identity={"model": "a", "dtype": "f32"})
    good = keep.read_text()

    def refused(text, *messages, sampling=Sampling(1), identity=None):  # noqa: B008
        keep.write_text(text)
        with pytest.raises(ValueError) as error:
            generate(unused, PROMPTS, sampling, keep=keep, identity=identity or {"model": "a", "dtype": "f32"})
        assert all(message in str(error.value) for message in (str(keep), *messages))
        assert keep.read_text() == text

    refused(good, "sampling.top_p: 0.9 → 0.5", "sampling.seed: 0 → 1", sampling=Sampling(1, top_p=0.5, seed=1))
    refused(good, "identity.model: 'a' → 'b'", "identity.dtype: 'f32' → None", "replace", identity={"model": "b"})
    refused("all my work", "line 1")
    refused('{"a": 1}\n', "line 1")
    refused("[1]\n", "line 1")
    lines = good.splitlines(True)
    for bad in ("{}\n", "x\n", "\n", "[]\n", lines[2][:-2] + ', "more": 1}\n', lines[2].replace(": 0", ': "0"')):
        refused("".join([*lines[:2], bad, *lines[3:]]), "line 3: not an answer")
    keep.write_text(good)
    other = dict(keep=keep, identity={"model": "b"})
    assert stored(prompts=PROMPTS, sampling=Sampling(1), **other) is None and keep.read_text() == good
    assert stored(keep, PROMPTS, Sampling(2), {"model": "a", "dtype": "f32"}) is None
    found = generate(unused, PROMPTS, Sampling(1), keep=keep, identity={"model": "a", "dtype": "f32"})
    assert stored(keep, PROMPTS, Sampling(1), {"model": "a", "dtype": "f32"}) == found
    keep.write_text(lines[0])  # of a run that failed before its first answer
    generate(Echo(), PROMPTS, Sampling(1), **other)
    generate(Echo(), PROMPTS[:1], Sampling(1), keep=keep, identity={"model": "a", "dtype": "f32"}, replace=True)
    assert keep.read_text().count("\n") == 2 and keep.read_text().startswith(lines[0])
    keep.write_text(good)
    with keep.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match=f"another process .*{keep}"):
            generate(unused, PROMPTS, Sampling(1), keep=keep, identity={"model": "a", "dtype": "f32"})
