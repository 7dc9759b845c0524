"""Answers of a chat model to prompts: seeded one by one, made in batches, and kept as they are made."""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .answers import Answer, AnswerFile, Key, key_of, read_answers

__all__ = ["Answer", "Engine", "Sampling", "TransformersEngine", "VLLMEngine", "draw", "generate", "stored"]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. ValueError for values out of range."""

    samples: int = 4  # answers to each prompt
    max_new_tokens: int = 96
    temperature: float = 0.7  # 0: the likeliest token at each step
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self):
        for name, least, most in (("samples", 1, math.inf), ("max_new_tokens", 1, math.inf), ("seed", 0, 2**64 - 1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} must be an integer from {least} to {most}, got {value!r}")
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0, or finite and at least 1e-6, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")


class Engine(Protocol):
    """A model that answers prompts. What is drawn for a row depends on its prompt, its key and the model alone."""

    context: int | None  # tokens of a prompt and its answer, at most; None: not known

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, without special tokens beside those of its text."""

    def answer(self, batch: Sequence[tuple[list[int], bytes]], sampling: Sampling) -> list[Answer]:
        """An answer to each pair of a prompt's tokens and a key of 32 bytes, which seeds its random numbers."""


def generate(
    engine: Engine | Callable[[], Engine],
    prompts: Sequence[str],  # chats as text, up to where an answer begins
    sampling: Sampling,
    *,
    batch_size: int = 16,
    keep: Path | None = None,
    identity: dict | None = None,
    replace: bool = False,
    progress: str | None = None,
) -> list[list[Answer]]:
    """`sampling.samples` answers to each prompt: sample j of prompts[i] is result[i][j].

    A sample is a function of the seed, the text of its prompt, j, and the model: neither the batch size nor the other
    prompts change it, and two models see the same random numbers. What is left is rounding: matrix products of batches
    of other shapes differ in their last bits, and a draw close to the border between two tokens may go the other way.
    In float32 that is rare. In bf16 it is common: of SmolLM2's answers of 32 tokens, about half differ between batches
    of 12 and 36, so there only runs of one batch size, not resumed, repeat each other exactly.

    Args:
        engine: or a function that makes it, called only if an answer is missing.
        batch_size: answers made at once, of prompts of similar length. vLLM batches by itself: give it hundreds.
        keep: a JSON-lines file of the answers, written batch by batch. Answers that are in it are not made again, also
            where there are more prompts or samples than before.
        identity: what else the answers in `keep` depend on, as JSON: the model, the engine, its dtype.
        replace: drop the answers in `keep` if they depend on other things.
        progress: the description of a progress bar over answers; None: no bar.

    ValueError for a prompt that has no tokens or leaves no room for its answer, and where `keep` holds other answers;
    RuntimeError where another process writes it, and for logits that are not finite.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a sequence of texts, got one text")
    if bad := [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]:
        raise TypeError(f"prompts[{bad[0]}] must be a text, which a chat template makes of messages")
    if not (hasattr(engine, "answer") or callable(engine)) or isinstance(engine, torch.nn.Module):
        raise TypeError(f"engine must be one, as TransformersEngine(model, tokenizer), got {type(engine).__name__}")
    if keep is not None and identity is None:
        raise ValueError("keep needs identity: what the answers depend on beside the prompts and the sampling")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    wanted, header = _keys(prompts, sampling), _header(sampling, identity)
    first = {row[0].prompt: i for i, row in reversed([*enumerate(wanted)])}
    with contextlib.nullcontext() if keep is None else AnswerFile(keep, header, replace) as file:
        answers: dict[Key, Answer] = file.answers if file else {}
        unique = dict.fromkeys(key for row in wanted for key in row)
        missing = [key for key in unique if key not in answers]
        if missing:
            engine = engine if hasattr(engine, "answer") else engine()
            indices = sorted({first[key.prompt] for key in missing})
            ids = dict(zip(indices, engine.encode([prompts[i] for i in indices]), strict=True))
            _check_lengths(ids, engine.context, sampling.max_new_tokens)
            missing.sort(key=lambda key: -len(ids[first[key.prompt]]))  # stable: samples of a prompt stay together
        done = len(unique) - len(missing)
        with tqdm(total=len(unique), initial=done, desc=progress, disable=progress is None) as bar:
            for start in range(0, len(missing), batch_size):
                part = missing[start : start + batch_size]
                batch = [(ids[first[key.prompt]], _seed(sampling.seed, key)) for key in part]
                made = dict(zip(part, engine.answer(batch, sampling), strict=True))
                if file:
                    file.add(made)
                answers |= made
                bar.update(len(part))
    return [[answers[key] for key in row] for row in wanted]


def stored(
    keep: Path, prompts: Sequence[str], sampling: Sampling, identity: dict | None = None
) -> list[list[Answer]] | None:
    """What `generate` would return if all of it is in `keep`, else None. The file is not touched."""
    try:
        answers, _ = read_answers(keep, keep.read_bytes(), json.loads(json.dumps(_header(sampling, identity))))
        return [[answers[key] for key in row] for row in _keys(prompts, sampling)]
    except (ValueError, OSError, KeyError):
        return None


def _keys(prompts: Sequence[str], sampling: Sampling) -> list[list[Key]]:
    return [[key_of(prompt, j) for j in range(sampling.samples)] for prompt in prompts]


def _header(sampling: Sampling, identity: dict | None) -> dict:
    settings = {name: value for name, value in asdict(sampling).items() if name != "samples"}
    return {"identity": identity, "sampling": settings}


def _check_lengths(ids: dict[int, list[int]], context: int | None, new: int) -> None:
    for i, tokens in ids.items():
        if not tokens:
            raise ValueError(f"prompts[{i}] has no tokens")
        if context is not None and len(tokens) + new > context:
            raise ValueError(
                f"prompts[{i}] has {len(tokens)} tokens, which with max_new_tokens {new} is beyond the model's context "
                f"of {context}: shorten the prompt or lower max_new_tokens"
            )


def _seed(seed: int, key: Key) -> bytes:
    return hashlib.sha256(f"{seed} {key.prompt} {key.sample}".encode()).digest()


def draw(
    logits: Tensor,  # (N, V) float32
    uniforms: Tensor,  # (N,) float64, in [0, 1)
    temperature: float,  # above 0
    top_p: float,  # in (0, 1]
) -> Tensor:  # (N,) int64
    """A token for each row, from softmax(logits / temperature) within the smallest set of likeliest tokens whose
    probabilities sum to at least `top_p` (Holtzman et al., 2020, nucleus sampling), by the inverse of the cumulative
    distribution over token ids. Tokens exactly as likely as the last of the set belong to it, too: ties are common in
    bf16, and how a sort orders them would depend on the batch."""
    probs = (logits / temperature).softmax(-1)
    ids = None
    if top_p < 1:
        # Tokens below this bound sum to at most half of what top_p leaves out, so all others are enough. There are few
        # of them, and to sort a whole vocabulary costs as much as a small model's forward.
        bound = (1 - top_p) / (2 * probs.shape[1])
        top, ids = probs.topk(int((probs >= bound).sum(-1).amax()))
        before = top.cumsum(-1, dtype=torch.float64) - top
        least = top.masked_fill(before >= top_p, math.inf).amin(-1, keepdim=True)
        ids = ids.sort(-1).values
        probs = probs.gather(-1, ids)
        probs = probs.masked_fill(probs < least, 0)
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # below the total also where the product rounds up to it, so that the token found has a probability above 0
    height = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, height, right=True)
    return (found if ids is None else ids.gather(-1, found))[:, 0]


class _Draw(LogitsProcessor):
    """Leaves of each row of logits the token that is drawn; all of them if the likeliest is wanted."""

    def __init__(self, keys: Sequence[bytes], start: int, sampling: Sampling, device: torch.device):
        self.start, self.sampling = start, sampling
        philox = [np.random.Philox(key=int.from_bytes(key[:16], "little")) for key in keys]
        uniforms = np.stack([np.random.Generator(p).random(sampling.max_new_tokens) for p in philox])
        self.uniforms = torch.from_numpy(uniforms).to(device)  # (N, max_new_tokens) float64

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step, sampling = input_ids.shape[1] - self.start, self.sampling
        if not scores.amax(-1).isfinite().all():
            raise RuntimeError(f"the model's logits are not finite at token {step} of an answer")
        if sampling.temperature == 0:
            return scores
        token = draw(scores, self.uniforms[:, step], sampling.temperature, sampling.top_p)
        return torch.full_like(scores, -math.inf).scatter_(1, token[:, None], 0.0)


class TransformersEngine:
    """A causal LM of transformers, also one with adapters or an attached objective, and its tokenizer. Of the model's
    generation_config only the end-of-sequence ids count. What is changed while it answers is put back."""

    def __init__(self, model, tokenizer):
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token")
        self.model, self.tokenizer = model, tokenizer
        self.context = getattr(model.config, "max_position_embeddings", None)
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]

    @torch.no_grad()
    def answer(self, batch: Sequence[tuple[list[int], bytes]], sampling: Sampling) -> list[Answer]:
        pad, device = self.tokenizer.pad_token_id, next(self.model.parameters()).device
        width = max(len(ids) for ids, _ in batch)
        rows = [[pad] * (width - len(ids)) + ids for ids, _ in batch]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in batch]
        drawing = _Draw([key for _, key in batch], width, sampling, device)
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, do_sample=False, pad_token_id=pad,
            eos_token_id=sorted(self.ends) or None,
        )  # fmt: skip
        with _generating(self.model, config):
            out = self.model.generate(
                input_ids=torch.tensor(rows, dtype=torch.int64, device=device),
                attention_mask=torch.tensor(mask, dtype=torch.int64, device=device),
                generation_config=config, logits_processor=LogitsProcessorList([drawing]),
            )  # fmt: skip
        answers = []
        for row in out[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in self.ends), None)
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answers.append(Answer(text, end is not None))
        return answers


@contextlib.contextmanager
def _generating(model, config: GenerationConfig) -> Iterator[None]:
    """The model in evaluation mode and with this generation_config: transformers takes what the given one leaves open,
    such as a repetition penalty, from the model's own."""
    modes = [(module, module.training) for module in model.modules()]
    own = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    try:
        model.eval()
        for module, _ in own:
            module.generation_config = config
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, its in own:
            module.generation_config = its


class VLLMEngine:
    """A model folder or hub name in vLLM, with options of vllm.LLM. Its random numbers are its own: answers differ from
    those of TransformersEngine. RuntimeError if vLLM cannot be imported."""

    def __init__(self, path: str, **options):
        try:
            from vllm import LLM
        except ImportError as error:
            raise RuntimeError(f"vllm cannot be imported ({error}): pip install vllm; it needs a GPU") from error
        self.llm = LLM(model=path, **options)
        self.context = self.llm.llm_engine.model_config.max_model_len

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return self.llm.get_tokenizer()(list(prompts), add_special_tokens=False)["input_ids"]

    def answer(self, batch: Sequence[tuple[list[int], bytes]], sampling: Sampling) -> list[Answer]:
        from vllm import SamplingParams

        # 63 bits of the key: vLLM's seeds are signed, and -1 means none
        params = [
            SamplingParams(
                n=1, temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_new_tokens,
                seed=int.from_bytes(key[:8], "little") >> 1,
            )
            for _, key in batch
        ]  # fmt: skip
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids, _ in batch], params, use_tqdm=False)
        return [Answer(o.outputs[0].text, o.outputs[0].finish_reason == "stop") for o in outputs]
