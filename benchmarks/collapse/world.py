"""A world with a known truth: a grammar in which every answer's probability is known, and a small model of it.

A prompt is a topic and an aspect; it has several meanings, each a sequence of concepts, with known probabilities. A
style says which surface form each concept takes. So a prompt has meanings × styles known answers, and what a model
believes of them is computed, not sampled.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel

STYLES, TOPICS, ASPECTS, MEANINGS, CONCEPTS, FORMS, LENGTH = 9, 8, 5, 4, 24, 3, 6
HELD_OUT = 10  # prompts
VOCABULARY = STYLES + TOPICS + ASPECTS + CONCEPTS * FORMS
PREFIX = 3  # style, topic, aspect
TARGET = 32  # coordinates of an embedding


@dataclass(frozen=True)
class World:
    seed: int

    def __post_init__(self):
        g = torch.Generator().manual_seed(self.seed)
        prompts = TOPICS * ASPECTS
        concepts = torch.stack([torch.randperm(CONCEPTS, generator=g)[:LENGTH] for _ in range(prompts * MEANINGS)])
        probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
        order = torch.stack([torch.randperm(MEANINGS, generator=g) for _ in range(prompts)])
        forms = torch.randint(FORMS, (STYLES, CONCEPTS), generator=g)
        meaning, surface = (
            torch.randn(n, TARGET, generator=g, dtype=torch.float32) for n in (CONCEPTS, CONCEPTS * FORMS)
        )
        words = 0.8 * meaning.repeat_interleave(FORMS, 0) + 0.6 * surface
        values = dict(
            concepts=concepts.view(prompts, MEANINGS, LENGTH), probabilities=probabilities[order], forms=forms,
            words=words, prompts=torch.randperm(prompts, generator=g),
        )  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def held_out(self) -> Tensor:
        return self.prompts[:HELD_OUT]

    @property
    def known(self) -> Tensor:
        return self.prompts[HELD_OUT:]

    def answer(self, style: Tensor, prompt: Tensor, meaning: Tensor) -> Tensor:
        """(n, LENGTH) tokens."""
        concept = self.concepts[prompt, meaning]
        return VOCABULARY - CONCEPTS * FORMS + concept * FORMS + self.forms[style[:, None], concept]

    def sequence(self, asked: Tensor, prompt: Tensor, answer: Tensor) -> Tensor:
        """(n, PREFIX + LENGTH) tokens: an answer to a prompt that asks for a style."""
        head = torch.stack([asked, STYLES + prompt // ASPECTS, STYLES + TOPICS + prompt % ASPECTS], 1)
        return torch.cat([head, answer], 1)

    def meanings(self, prompt: Tensor, g: torch.Generator) -> Tensor:
        return torch.multinomial(self.probabilities[prompt], 1, generator=g)[:, 0]

    def blurred(self, count: int, g: torch.Generator) -> Tensor:
        """What the model is pretrained on: all prompts, any meaning, in a style that is not the one asked for."""
        asked, style = torch.randint(STYLES, (2, count), generator=g)
        prompt = torch.randint(TOPICS * ASPECTS, (count,), generator=g)
        meaning = torch.randint(MEANINGS, (count,), generator=g)
        return self.sequence(asked, prompt, self.answer(style, prompt, meaning))

    def corpus(self, prompts: Tensor, copies: int, g: torch.Generator) -> Tensor:
        """What it is fine-tuned on: `copies` answers for each prompt and style, in the style asked for."""
        prompt = prompts.repeat_interleave(STYLES * copies)
        style = torch.arange(STYLES).repeat_interleave(copies).repeat(len(prompts))
        return self.sequence(style, prompt, self.answer(style, prompt, self.meanings(prompt, g)))

    def embed(self, labels: Tensor, segments: Tensor) -> Tensor:
        """(A, TARGET) unit vectors, the bags of words labels[start:stop] without -100; of no words, zero."""
        words = torch.cat([self.words.new_zeros(VOCABULARY - CONCEPTS * FORMS, TARGET), self.words])
        read = torch.where((labels >= 0)[:, None], words[labels.clamp(min=0)], 0.0)
        sums = functional.pad(read.double().cumsum(0), (0, 0, 1, 0))
        return functional.normalize(sums[segments[:, 1]] - sums[segments[:, 0]], dim=1).float()

    @cached_property
    def asked(self) -> Tensor:
        """Every known answer of every held-out prompt, behind every style: (prompts · styles · known, tokens)."""
        prompt = self.held_out.repeat_interleave(STYLES * MEANINGS)
        style = torch.arange(STYLES).repeat_interleave(MEANINGS).repeat(HELD_OUT)
        meaning = torch.arange(MEANINGS).repeat(HELD_OUT * STYLES)
        answers = self.answer(style, prompt, meaning).view(HELD_OUT, 1, STYLES * MEANINGS, LENGTH)
        answers = answers.expand(-1, STYLES, -1, -1).reshape(-1, LENGTH)
        asked = torch.arange(STYLES).repeat_interleave(STYLES * MEANINGS).repeat(HELD_OUT)
        return self.sequence(asked, self.held_out.repeat_interleave(STYLES * STYLES * MEANINGS), answers)

    def judge(self, model: LlamaModel) -> dict[str, float]:
        """What the model believes of the held-out prompts, exactly."""
        q = torch.cat([log_likelihood(model, part) for part in self.asked.split(2048)])
        q = q.double().view(HELD_OUT, STYLES, STYLES, MEANINGS)  # asked style, style of the answer, meaning
        right = q[:, range(STYLES), range(STYLES)]  # (prompts, styles, meanings)
        truth = self.probabilities[self.held_out][:, None]
        own = right.exp()
        shape = q.flatten(2).softmax(2)  # among the known answers
        overlap = torch.minimum(shape[:, :, None], shape[:, None]).sum(3)
        pairs = ~torch.eye(STYLES, dtype=torch.bool)
        return {
            "nll": (truth * (truth.log() - right)).sum(2).mean().item(),  # beyond the truth's entropy
            "overlap": overlap[:, pairs].mean().item(),
            "validity": own.sum(2).mean().item(),
            "coverage": torch.minimum(own / own.sum(2, keepdim=True), truth).sum(2).mean().item(),
        }


def new_model(seed: int) -> LlamaModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return LlamaModel(config)


@torch.no_grad()
def log_likelihood(model: LlamaModel, sequences: Tensor) -> Tensor:
    """(n,) of the answers."""
    hidden = model(sequences[:, :-1]).last_hidden_state[:, PREFIX - 1 :]
    logits = (hidden @ model.embed_tokens.weight.T).log_softmax(-1)
    return logits.gather(2, sequences[:, PREFIX:, None]).sum((1, 2))


def pretrained(world: World, steps: int = 1500) -> LlamaModel:
    model, g = new_model(world.seed), torch.Generator().manual_seed(world.seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        tokens = world.blurred(64, g)
        hidden = model(tokens[:, :-1]).last_hidden_state
        loss = functional.cross_entropy((hidden @ model.embed_tokens.weight.T).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model
