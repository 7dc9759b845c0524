"""Answers of a chat model to prompts, in batches."""

from collections.abc import Sequence

import torch


@torch.no_grad()
def generate(
    model,
    tokenizer,
    prompts: Sequence[str],  # chats as text, up to where an answer begins
    *,
    max_new_tokens: int = 96,
    temperature: float = 0.7,
    top_p: float = 0.9,
    batch_size: int = 16,
    seed: int = 0,
) -> list[str]:
    """A sampled answer to each prompt. The global random state and the model's mode are left as they were."""
    device = next(model.parameters()).device
    side, training = tokenizer.padding_side, model.training
    tokenizer.padding_side = "left"
    model.eval()
    answers = []
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                part = list(prompts[start : start + batch_size])
                batch = tokenizer(part, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
                out = model.generate(
                    **batch, do_sample=True, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                )  # fmt: skip
                new = out[:, batch["input_ids"].shape[1] :]
                answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    finally:
        tokenizer.padding_side = side
        model.train(training)
    return answers
