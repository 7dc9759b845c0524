"""A sentence encoder of a given size with random weights, and a tokenizer that it shares with the language model.

Neither needs a download or a package of weights. The vocabulary is made up, a word of four letters for every id, so
that the text of k labels has k words and is k tokens to the encoder again: no provider's encoder reads more, or less,
than the segment has.
"""

import functools
import tempfile
from pathlib import Path

import torch

from .models import EncoderShape

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MOST_TOKENS = 512  # that the encoder reads of a text


def words(count: int) -> list[str]:
    """Different words of four letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(letters[i // 26**k % 26] for k in range(4)) for i in range(count)]


def make_tokenizer(vocab: int):
    """A WordPiece tokenizer whose id i, past the special ones, is a word of its own."""
    from transformers import BertTokenizer

    entries = [*SPECIAL, *words(vocab - len(SPECIAL))]
    return BertTokenizer(vocab={word: i for i, word in enumerate(entries)}, model_max_length=MOST_TOKENS)


@functools.lru_cache(maxsize=1)
def make_encoder(shape: EncoderShape, dtype: torch.dtype, device: torch.device, tokenizer=None):
    """A SentenceTransformer around a BERT, its pooling the mean, as the published code has it of every encoder: so the
    published targets and ours are of the same embeddings. One is kept for the cases to come.

    tokenizer   of `shape.vocab` words; None: the one that is made up.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=MOST_TOKENS,
    )
    with tempfile.TemporaryDirectory() as folder:  # sentence-transformers takes a model from a folder only
        torch.manual_seed(1)
        with device:
            BertModel(config).to(dtype).save_pretrained(folder)
        (tokenizer or make_tokenizer(shape.vocab)).save_pretrained(folder)
        body = Transformer(str(Path(folder)), max_seq_length=MOST_TOKENS, model_kwargs={"dtype": dtype})
        encoder = SentenceTransformer(modules=[body, Pooling(shape.hidden_size, "mean")], device=str(device))
    return encoder.eval().requires_grad_(False)
