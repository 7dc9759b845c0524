"""Encoders and tokenizers in the place of real ones, where what they say does not matter."""

import torch
from torch import Tensor


class RandomEncoder(torch.nn.Module):
    """Unit vectors of a given size, at once, the same for as many texts."""

    prompts = truncate_dim = max_seq_length = None

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def get_embedding_dimension(self) -> int:
        return self.size

    def encode_document(self, texts: list[str], **options) -> Tensor:
        found = torch.randn(len(texts), self.size, generator=torch.Generator().manual_seed(len(texts)))
        return torch.nn.functional.normalize(found, dim=1)


class OneWord:
    """A tokenizer for which no text is worth the time."""

    is_fast = False

    def get_vocab(self) -> dict:
        return {}

    def batch_decode(self, pieces: list, skip_special_tokens: bool) -> list[str]:
        return [str(i) for i in range(len(pieces))]
