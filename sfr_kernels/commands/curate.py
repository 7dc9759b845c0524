"""The `curate` command: the rows of public code sets that the recipe keeps, as chats that `train` reads."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm
from transformers.utils import logging as hf_logging

from ..atomic import atomic_file
from ..training.curation import RECIPES, Recipe, Row, Selection, count_by_characters
from ..training.models import load_tokenizer

_BATCH_ROWS = 128  # answers may be long, and a token counted takes 36 bytes
_BUFFER = 1 << 20  # bytes read of a column at once, so that a row group, of any size, is never held whole
_MARKS = ("verified", "is_passed", "average_test_score")  # these may be numbers or booleans; the rest are texts


def run(args) -> None:
    """Writes the chats and says what was dropped. Errors as of `curate`."""
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"--out {args.out} exists: --overwrite replaces it")
    count_tokens = count_by_characters
    if args.model is not None:
        if not RECIPES[args.format].limited:
            raise ValueError(f"--model counts the tokens of answers, which --format {args.format} does not limit")
        hf_logging.set_verbosity_error()  # every answer longer than the model's context is a warning
        count_tokens = _counter(load_tokenizer(args.model)[0])
    counts = curate(args.files, RECIPES[args.format], args.out, count_tokens)
    print(f"{report(counts)}\n{args.out}", file=sys.stderr)


def curate(
    files: Sequence[Path], recipe: Recipe, out: Path, count_tokens: Callable[[Sequence[str]], Sequence[int]]
) -> dict[str, int]:
    """Writes the chats of the rows that `recipe` keeps, in the order of the files' rows, to `out`: JSON lines of
    {"messages": [user, assistant]}, all of them or none. The files are read twice, and no text is held between.

    `count_tokens` gives the tokens in each of several texts. Returns `Selection.counts`. ValueError or
    FileNotFoundError naming the files that are not parquet, do not exist, are given twice, lack columns or have
    two of one name, or hold no row that is kept, before anything is written.
    """
    if out.is_dir() or out.resolve() in [path.resolve() for path in files]:
        raise ValueError(f"the chats need a file of their own, got {out}")
    columns = _columns(files, recipe)
    selection = Selection(recipe, count_tokens)
    for batch in _batches(columns, "judged"):
        selection.add(_rows(batch))
    counts, places = selection.counts(), selection.places()
    del selection
    if not places:
        raise ValueError(f"no row of {', '.join(map(str, files))} is kept:\n{report(counts)}")
    texts = {path: [c for c in found if c in _texts(recipe)] for path, found in columns.items()}
    with atomic_file(out) as file:
        first = 0
        for batch in _batches(texts, "written"):
            kept = [i for i in range(len(batch)) if first + i in places]
            first += len(batch)
            for row in _rows(batch.take(pa.array(kept, pa.int64()))):
                turns = zip(("user", "assistant"), recipe.chat(row), strict=True)
                chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
                file.write((json.dumps(chat, ensure_ascii=False) + "\n").encode())
    return counts


def report(counts: dict[str, int]) -> str:
    """A line for the rows that were kept and for each reason to drop one."""
    width = len(f"{max(counts.values()):,}")
    return "\n".join(f"{count:>{width},}  {what}" for what, count in counts.items())


def _texts(recipe: Recipe) -> tuple[str, ...]:
    return (recipe.question, recipe.answer, *recipe.codes)


def _counter(tokenizer) -> Callable[[Sequence[str]], list[int]]:
    def count_tokens(texts: Sequence[str]) -> list[int]:
        found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
        return [len(ids) for ids in found["input_ids"]]

    return count_tokens


def _columns(files: Sequence[Path], recipe: Recipe) -> dict[Path, tuple[str, ...]]:
    """The columns to read of each file, all of which are checked first. Errors as of `curate`."""
    twice = [str(path) for path, count in Counter(path.resolve() for path in files).items() if count > 1]
    if twice:
        raise ValueError(f"given more than once: {', '.join(twice)}")
    columns, wrong = {}, []
    for path in files:
        schema = _open(path).schema_arrow
        columns[path] = recipe.columns(schema.names)
        if missing := [name for name in columns[path] if name not in schema.names]:
            wrong.append(f"{path} has no column {', '.join(missing)}; it has {', '.join(schema.names)}")
            continue
        for name in columns[path]:
            if schema.names.count(name) > 1:
                wrong.append(f"{path} has {schema.names.count(name)} columns {name}")
                continue
            kind = schema.field(name).type
            if not (_is_text(kind) or pa.types.is_null(kind) or (name in _MARKS and pa.types.is_primitive(kind))):
                wrong.append(f"{path}: column {name} must hold strings, it holds {kind}")
        if recipe.released_as_passed(schema.names):
            print(f"{path}: no verified and is_passed, as in synthetic_sft: every answer passed", file=sys.stderr)
    if wrong:
        raise ValueError("\n".join(wrong))
    return columns


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise FileNotFoundError(f"parquet file {path} does not exist")
    try:
        return pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error


def _batches(columns: dict[Path, Sequence[str]], unit: str) -> Iterator[pa.RecordBatch]:
    """The rows of the files, some at a time, with a progress bar, and texts as large_binary: not all kinds of string
    can be taken from. ValueError naming a file that cannot be read."""
    with tqdm(total=sum(_open(path).metadata.num_rows for path in columns), desc=f"rows {unit}", unit="row") as bar:
        for path, names in columns.items():
            with _open(path) as file:
                batches = file.iter_batches(_BATCH_ROWS, columns=list(names))
                while True:
                    try:
                        batch = next(batches, None)
                    except (pa.ArrowException, OSError) as error:
                        raise ValueError(f"{path} cannot be read: {error}") from error
                    if batch is None:
                        break
                    arrays = [c.cast(pa.large_binary()) if _is_text(c.type) else c for c in batch.columns]
                    yield pa.RecordBatch.from_arrays(arrays, batch.schema.names)
                    bar.update(len(batch))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _rows(batch: pa.RecordBatch) -> list[Row]:
    """The rows by column. Bytes of a string that are not UTF-8 become lone surrogates, which the recipe drops."""
    values = []
    for column in batch.columns:
        raw = column.to_pylist()
        if pa.types.is_large_binary(column.type):
            raw = [None if text is None else text.decode(errors="surrogateescape") for text in raw]
        values.append(raw)
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*values, strict=True)]
