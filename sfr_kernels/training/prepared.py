"""The targets of data sets that TRL has prepared: tokenized, cut and packed. A pack is a sample.

They are in folder/train, and in folder/eval or, of several evaluation sets, in folder/eval-<name>. `sample_id` counts
the training samples, and goes on through the evaluation samples.
"""

import os
from pathlib import Path
from urllib.parse import quote

import numpy as np
from datasets import Dataset, IterableDataset

from ..config import SFRConfig
from ..rows import IGNORE_INDEX
from ..targets import DamagedStore, SampleList, TargetStore, build_targets
from ..targets.manifest import FILE, StaleTargets
from ..targets.segments import packed_starts

_COLUMNS = ("input_ids", "labels", "position_ids", "seq_lengths")


def named_sets(train, evaluation) -> dict[str, Dataset | IterableDataset]:
    """The data sets, each under the name of its folder."""
    if not evaluation:
        return {"train": train}
    if isinstance(evaluation, dict):
        return {"train": train} | {f"eval-{quote(str(k), safe='')}": data for k, data in evaluation.items()}
    return {"train": train, "eval": evaluation}


def check_folder(folder: str | os.PathLike, encoder, sets: dict) -> None:
    """ValueError if targets can neither be opened in the folder nor be built there, before the data are prepared."""
    for name, data in sets.items():
        if isinstance(data, IterableDataset):
            raise ValueError(
                f"targets must be OnlineTargets for an IterableDataset ({name}), of which no store can be built ahead"
            )
        if encoder is None and not (Path(folder) / name / FILE).is_file():
            raise ValueError(f"encoder must be given: there are no targets in {Path(folder) / name} yet")


def find_targets(
    folder: str | os.PathLike,
    sets: dict[str, Dataset],  # prepared
    config: SFRConfig,
    tokenizer,
    encoder,
    *,
    whole_by_default: bool,  # the collator labels every token of a sample without labels
    masks_starts: bool,  # the collator masks the label of a sample's first token
) -> TargetStore:
    """The targets of all sets in one store: opened, or where there are none, built."""
    stores = []
    for name, data in sets.items():
        samples = _Samples(data, whole_by_default, masks_starts and config.target_rule == "published")
        place = Path(folder) / name
        try:
            if encoder is None:
                data = SampleList(samples).fingerprint
                stores.append(TargetStore.open(place, config, tokenizer=tokenizer, data=data))
            else:
                stores.append(build_targets(samples, config, tokenizer, encoder, folder=place))
        except (StaleTargets, DamagedStore) as error:
            raise ValueError(f"{error.args[0]}. Give another folder in targets=, or remove {place}") from None
    return TargetStore.concat(stores)


class _Samples:
    """A prepared data set, each sample with the labels that the collator will give it."""

    def __init__(self, data: Dataset, whole_by_default: bool, masks_starts: bool):
        if data.format["type"] != "custom":
            data = data.select_columns([c for c in _COLUMNS if c in data.column_names]).with_format("numpy")
        self.data, self.whole_by_default, self.masks_starts = data, whole_by_default, masks_starts

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict:
        sample = dict(self.data[i])
        if self.whole_by_default:
            sample.setdefault("labels", sample["input_ids"])
        if self.masks_starts:
            labels = sample["labels"] = sample["labels"].copy()
            labels[[0, *packed_starts(sample, f"sample {i}")]] = IGNORE_INDEX
        return sample


def number(data: Dataset | IterableDataset, start: int) -> Dataset | IterableDataset:
    """The data set with a `sample_id` that counts from `start`, for a stream in the order in which samples come."""
    if isinstance(data, IterableDataset):
        return data.map(_with_id, with_indices=True, fn_kwargs={"start": start})
    if "sample_id" in data.column_names:
        data = data.remove_columns("sample_id")
    return data.add_column("sample_id", np.arange(start, start + len(data)))


def _with_id(sample: dict, index: int, start: int) -> dict:
    return {"sample_id": start + index}


def has_ids(data) -> bool:
    return "sample_id" in (getattr(data, "column_names", None) or ())


def number_all(sets: dict, given: TargetStore | None) -> dict:
    """All sets numbered in one count. With a store that was `given`, the samples keep the ids that they have."""
    if given is not None:
        if all(map(has_ids, sets.values())):
            return sets
        count = sum(len(data) for data in sets.values())
        if count != len(given):
            raise ValueError(
                f"targets hold {len(given)} samples, the prepared data {count}, without a 'sample_id' (packing drops "
                "it): give a folder and an encoder, so that the targets are made of the data as they are prepared"
            )
    numbered, start = {}, 0
    for name, data in sets.items():
        numbered[name] = number(data, start)
        start += 0 if isinstance(data, IterableDataset) else len(data)
    return numbered
