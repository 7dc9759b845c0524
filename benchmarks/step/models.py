"""The models of a training step: of real sizes, with random weights; nothing is downloaded.

Decoder and sentence encoder share a made-up vocabulary: a text of k labels is k tokens to the encoder again.
"""

import functools
import itertools
import tempfile
from collections import namedtuple

import torch
from torch import nn

RANK = 8  # of LoRA
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MOST_TOKENS = 512  # that the encoder reads of a text
# Sizes of a decoder and of a BERT, under the names of their configs in transformers; a BERT's hidden size is d.
_SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads"
Trunk = namedtuple("Trunk", f"name model_type {_SIZES} num_key_value_heads vocab_size tie_word_embeddings")
EncoderShape = namedtuple("EncoderShape", "hidden_size num_hidden_layers num_attention_heads intermediate_size")
QWEN2 = Trunk("Qwen2-1.5B", "qwen2", 1536, 8960, 28, 12, 2, 151936, True)
LLAMA3 = Trunk("Llama-3-8B", "llama", 4096, 14336, 32, 32, 8, 128256, False)
SMOLLM2 = Trunk("SmolLM2-135M", "llama", 576, 1536, 30, 9, 3, 49152, True)
MINILM, BGE_LARGE = EncoderShape(384, 6, 12, 1536), EncoderShape(1024, 24, 16, 4096)
ENCODER_VOCAB = 30522  # of both


def build_model(trunk: Trunk, lora: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """In training mode. Adapters are as in mid-training: were one factor zero, the other would have no gradient."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{n: size for n, size in trunk._asdict().items() if n != "name"}, use_cache=False)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if lora:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    return model.train()


def make_tokenizer():
    """WordPiece; every id past the special ones is a word of its own, of four letters."""
    from transformers import BertTokenizer

    words = map("".join, itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=4))
    vocab = dict(zip(itertools.chain(SPECIAL, words), range(ENCODER_VOCAB), strict=False))
    return BertTokenizer(vocab=vocab, model_max_length=MOST_TOKENS)


@functools.lru_cache(maxsize=1)
def make_encoder(shape: EncoderShape, dtype: torch.dtype, device: torch.device):
    """A SentenceTransformer around a BERT, with mean pooling, which the published code has of every encoder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    config = BertConfig(**shape._asdict(), vocab_size=ENCODER_VOCAB, max_position_embeddings=MOST_TOKENS)
    with tempfile.TemporaryDirectory() as folder:  # sentence-transformers takes a model from a folder only
        torch.manual_seed(1)
        with device:
            BertModel(config).to(dtype).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        body = Transformer(folder, max_seq_length=MOST_TOKENS, model_kwargs={"dtype": dtype})
        encoder = SentenceTransformer(modules=[body, Pooling(shape.hidden_size, "mean")], device=str(device))
    return encoder.eval().requires_grad_(False)
