"""Encoders and tokenizers in the place of real ones, where what they say does not matter."""

from pathlib import Path

import torch
from torch import Tensor


class RandomEncoder(torch.nn.Module):
    """Unit vectors of a given size, at once."""

    prompts = truncate_dim = max_seq_length = None

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def get_embedding_dimension(self) -> int:
        return self.size

    def encode_document(self, texts: list[str], **options) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(len(texts), self.size), dim=1)


class OneWord:
    """A tokenizer for which no text is worth the time."""

    is_fast = False

    def get_vocab(self) -> dict:
        return {}

    def batch_decode(self, pieces: list, skip_special_tokens: bool) -> list[str]:
        return [str(i) for i in range(len(pieces))]


BGE_LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


def bert_encoder(folder: Path, device: torch.device, dtype: torch.dtype, **shape: int):
    """A SentenceTransformer with random weights, and MiniLM's tokenizer, whose vocabulary is BERT's."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    from sfr_kernels.training.models import MINILM, encoder_path

    shape = BGE_LARGE | shape
    BertModel(BertConfig(**shape)).to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder_path(MINILM)).save_pretrained(folder)
    body = Transformer(str(folder), max_seq_length=512, model_kwargs={"dtype": dtype})
    return SentenceTransformer(modules=[body, Pooling(shape["hidden_size"], "cls")], device=str(device))
