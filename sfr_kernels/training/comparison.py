"""Which chats of a data file models are asked to answer, and what their answers are measured with."""

import random
import sys
from collections.abc import Sequence

from ..evaluation.compare import Cell, Setting
from ..evaluation.diversity import words
from ..evaluation.fidelity import StyleProbe
from ..targets.encoder import encode
from .formats import Example
from .labelling import last_prompt

Asked = dict[Cell, list[Example]]  # the chats that are answered, with all the answers that the data has
_PROBED = 4000  # training answers that the style probe is fitted to, at most: on a CPU each takes some 10 ms to embed


def persona_of(example: Example) -> str:
    """What the file calls it, or else the system message."""
    first = example.messages[0]
    return example.persona or (first["content"] if first["role"] == "system" else "")


def answer_of(example: Example) -> str:
    return example.messages[-1]["content"]


def conversation(example: Example) -> str:
    """What was said before the last answer, beside the system message: in a chat of one turn, what the user says."""
    return "\n".join(m["content"] for m in example.messages[:-1] if m["role"] != "system")


def choose(examples: Sequence[Example], most: int) -> Asked:
    """The examples of the first `most` conversations, by conversation and persona; not those whose answer has no text.
    There are personas where most of the conversations are led with two or more; else all have the persona ""."""
    led: dict[str, list[Example]] = {}
    for example in examples:
        prompt = conversation(example)
        if answer_of(example).strip() and (prompt in led or len(led) < most):
            led.setdefault(prompt, []).append(example)
    personas = 2 * sum(len({*map(persona_of, group)}) > 1 for group in led.values()) > len(led)
    asked: Asked = {}
    for prompt, group in led.items():
        for example in group:
            asked.setdefault(Cell(prompt, persona_of(example) if personas else ""), []).append(example)
    return asked


def prompts_of(asked: Asked, tokenizer) -> list[str]:
    return [last_prompt(examples[0], tokenizer) for examples in asked.values()]


def with_room(asked: Asked, tokenizer, longest: int | None, new: int) -> Asked:
    """Those whose prompt leaves room for `new` tokens in a model's context; says how many do not. ValueError where the
    chat template makes the same prompt of two personas, whose answers would tell nothing of either."""
    kept: Asked = {}
    texts: dict[tuple[str, str], Cell] = {}
    for (cell, examples), text in zip(asked.items(), prompts_of(asked, tokenizer), strict=True):
        if (other := texts.setdefault((cell.prompt, text), cell)) is not cell:
            raise ValueError(
                f"{examples[0].where}: the personas {other.persona!r} and {cell.persona!r} are asked in the same "
                "words: the chat template drops the system message, or no message says who speaks"
            )
        length = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if longest is None or length + new <= longest:
            kept[cell] = examples
    if len(kept) < len(asked):
        left_out = f"{len(asked) - len(kept)} of {len(asked)} chats are left out"
        print(f"{left_out}: no room for an answer in a context of {longest} tokens", file=sys.stderr)
    return kept


def setting_of(asked: Asked, rest: Sequence[Example], encoder) -> Setting:
    """What the answers are measured with; the style probe and the vocabulary are of the answers of `rest`."""
    cells, embed, probe = list(asked), embedder(encoder), None
    answers = [[answer_of(example) for example in examples] for examples in asked.values()]
    references = [group[: min(map(len, answers))] for group in answers]  # as many of each
    known = {cell.persona for cell in cells} & {persona_of(e) for e in rest}
    rest = [e for e in rest if answer_of(e).strip()]
    if len(rest) > _PROBED:
        rest = random.Random(0).sample(rest, _PROBED)
    spoken = [(answer_of(e), persona_of(e)) for e in rest if persona_of(e) in known]
    if len({persona for _, persona in spoken}) > 1:
        probe = StyleProbe(embed([text for text, _ in spoken]), [persona for _, persona in spoken])
    vocabulary = vocabulary_of([*map(answer_of, rest)] or [text for group in answers for text in group])
    probed = {id(e) for e in rest}
    return Setting(cells, embed, vocabulary, probe, references, any(id(e) in probed for x in asked.values() for e in x))


def vocabulary_of(texts: Sequence[str]) -> int:
    return len({word for text in texts for word in words(text)})


def embedder(encoder):
    """(n, d) unit vectors of n texts. Between calls the encoder leaves a GPU to the model."""
    device = encoder.device

    def embed(texts: list[str]):
        encoder.to(device)
        try:
            return encode(encoder, texts)
        finally:
            encoder.to("cpu")

    return embed
