"""Small models, data and stores for the tests of targets and training."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sfr_kernels import SFRConfig
from sfr_kernels.rows import SupervisedRows
from sfr_kernels.targets import TargetStore

VOCAB, HIDDEN, TARGET = 96, 32, 12
CONFIG = SFRConfig(width=24, stride=4, min_tokens=3, segment_tokens=6)
SIZES = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **overrides}))


def tiny_samples(count: int = 8, seed: int = 0, **extra) -> list[dict]:
    """Samples of different lengths: an unlabelled prompt, then a labelled response."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(count):
        prompt, response = (int(torch.randint(3, 18, (1,), generator=generator)) for _ in range(2))
        ids = torch.randint(3, VOCAB, (prompt + response,), generator=generator).tolist()
        samples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "sample_id": i, **extra})
    return samples


def tiny_store(samples: list[dict], config: SFRConfig = CONFIG, size: int = TARGET, seed: int = 0) -> TargetStore:
    """Random unit-norm embeddings for the anchors of the samples."""
    counts = [SupervisedRows.from_labels(torch.tensor(s["labels"]), config).num_anchors for s in samples]
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.nn.functional.normalize(torch.randn(sum(counts), size, generator=generator), dim=1)
    return TargetStore(embeddings, torch.tensor([0, *counts]).cumsum(0))


def pad(features: list[dict]) -> dict[str, torch.Tensor]:
    """A right-padding collator."""
    length = max(len(f["input_ids"]) for f in features)

    def column(name, fill):
        return torch.tensor([f[name] + [fill] * (length - len(f[name])) for f in features])

    mask = [[1] * len(f["input_ids"]) + [0] * (length - len(f["input_ids"])) for f in features]
    return {"input_ids": column("input_ids", 0), "labels": column("labels", -100), "attention_mask": torch.tensor(mask)}


def write_chats(path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def chat(prompt: str, answer: str, system: str = "You are terse.") -> dict:
    roles = (("system", system), ("user", prompt), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}
