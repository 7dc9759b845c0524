"""The targets of data sets that TRL has prepared: tokenized, cut and packed, so that a pack is what counts as a sample.

    folder/train            the targets of the training data
    folder/eval             of the evaluation data, or
    folder/eval-<name>      of each evaluation set

All samples have one count, `sample_id`: the evaluation data's goes on from the training data's.
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
                f"targets must be OnlineTargets for an IterableDataset ({name}), which cannot be read ahead to build "
                "a store: targets=OnlineTargets(encoder, tokenizer)"
            )
        if encoder is None and not (Path(folder) / name / FILE).is_file():
            raise ValueError(
                f"encoder must be given: there are no targets in {Path(folder) / name} yet, and it is to embed them"
            )


def find_targets(
    folder: str | os.PathLike,
    sets: dict[str, Dataset],  # prepared
    config: SFRConfig,
    tokenizer,
    encoder,
    *,
    whole_by_default: bool,  # a sample without labels is one that is labelled throughout
    masks_starts: bool,  # the collator takes the label of a sample's first token away
) -> TargetStore:
    """The targets of all sets, set after set: opened, or where there are none, built."""
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
    """The data set with a `sample_id` that counts from `start`; of a stream, as the samples come."""
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
    """All sets under one count. Where a store was given, the ids that the samples have are its own, and kept."""
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
