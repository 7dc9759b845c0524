"""Sentence embeddings from any sentence-transformers model."""

import hashlib
import os

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


def load_encoder(name_or_path: str, device: str | torch.device | None = None):
    """The SentenceTransformer at a path, or of a name known to the local cache or the hub.

    RuntimeError saying what to do if it cannot be loaded, for example offline.
    """
    from sentence_transformers import SentenceTransformer

    if os.path.sep in name_or_path and name_or_path.startswith((".", os.path.sep)) and not os.path.isdir(name_or_path):
        raise RuntimeError(f"encoder {name_or_path!r} cannot be loaded: there is no such folder")
    try:
        return SentenceTransformer(name_or_path, device=None if device is None else str(device))
    except Exception as error:
        raise RuntimeError(
            f"encoder {name_or_path!r} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}). Give "
            "the folder of a sentence-transformers model, or a name that is in the local cache or reachable"
        ) from error


def fingerprint(encoder) -> str:
    """What tells one encoder from another: a hash of its prompts and of a part of every weight."""
    digest = hashlib.sha256(repr(sorted((encoder.prompts or {}).items())).encode())
    for name, value in encoder.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.flatten()[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def encode(
    encoder,  # SentenceTransformer
    texts: list[str],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> Tensor:  # (len(texts), d) float32, unit norm; zero where the text is empty
    """Embeds each distinct text once. ValueError if the encoder returns NaN."""
    unique = sorted({text for text in texts if text}, key=lambda text: (len(text), text))
    position = {text: i for i, text in enumerate(unique)}
    size = encoder.get_embedding_dimension()
    table = np.zeros((len(unique) + 1, size), np.float32)  # the last row stays zero, for empty texts
    with tqdm(total=len(unique), desc="targets", unit="segment", disable=not progress) as bar:
        for start in range(0, len(unique), batch_size):
            batch = unique[start : start + batch_size]
            table[start : start + len(batch)] = encoder.encode_document(
                batch, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
            )
            bar.update(len(batch))
    if not np.isfinite(table).all():
        raise ValueError("the encoder returned NaN or infinite embeddings")
    return torch.from_numpy(table[[position.get(text, len(unique)) for text in texts]])
