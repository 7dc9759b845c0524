"""Answers to prompts: what is drawn, that each depends on its own seed alone, and that a stopped run goes on."""

import hashlib
import random
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny import VOCAB, adapted, attached, tiny_llama, tiny_store
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from sfr_kernels.evaluation.generate import Answer, Sampling, TransformersEngine, VLLMEngine, draw, generate

PROMPTS = ["w05 w06 w07", "w08", "w09 w10 w11 w12 w13 w14 w15", "w16 w17", "w18 w19 w20"]


@pytest.fixture(scope="module")
def tokenizer():
    """Every token is a word, `w` and its id of two digits; the end, which also pads, is the tiny model's."""
    words = Tokenizer(models.WordLevel({f"w{i:02}": i for i in range(VOCAB)}, unk_token="w03"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w02", eos_token="w02")


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def steep(**overrides):
    """A model in float64, so that no draw hangs on the rounding of a batch, whose next token is far from uniform."""
    model = tiny_llama(**overrides).double()
    model.lm_head.weight.data *= 20
    return model


class Echo:
    """An engine whose answers are made of the prompt and the key; it can stop at a batch."""

    context = None

    def __init__(self, stop_at: int | None = None):
        self.stop_at, self.batches = stop_at, []

    def encode(self, prompts):
        return [ids(prompt) for prompt in prompts]

    def answer(self, batch, sampling):
        if len(self.batches) == self.stop_at:
            raise KeyboardInterrupt
        self.batches.append([tokens for tokens, _ in batch])
        return [Answer(f"{tokens} é\n{key[:4].hex()}", key[0] % 2 == 0) for tokens, key in batch]


def unused():
    raise AssertionError("the engine is not needed")


# --- drawing


def test_the_inverse_of_the_cumulative_distribution_by_hand():
    row = torch.tensor([0.125, 0.5, 0.125, 0.25], dtype=torch.float32).log()

    def drawn(uniforms, temperature, top_p):
        found = draw(row.expand(len(uniforms), -1), torch.tensor(uniforms, dtype=torch.float64), temperature, top_p)
        return found.tolist()

    last = 1 - 2**-53  # the greatest that numpy draws
    assert drawn([0.0, 0.124, 0.126, 0.624, 0.626, 0.749, 0.751, last], 1.0, 1.0) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert drawn([0.0, 0.66, 0.67, last], 1.0, 0.7) == [1, 1, 3, 3]  # 1/2 and 1/4 of 3/4
    assert drawn([0.0, 0.9, last], 1.0, 0.4) == [1, 1, 1]  # the likeliest alone exceeds top_p
    assert drawn([0.0, 0.13, last], 1.0, 0.8) == [0, 1, 3]  # of two that are equally likely, both
    # squared, the probabilities are as 1 : 16 : 1 : 4
    assert drawn([0.045, 0.046, 0.772, 0.773, 0.818, 0.819], 0.5, 1.0) == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_frequencies_are_the_probabilities(temperature, top_p):
    logits = np.random.default_rng(1).normal(size=12) * 1.5
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    kept, mass = [], 0.0
    for token in np.argsort(-expected):
        if mass < top_p:
            kept, mass = [*kept, token], mass + expected[token]
    count = 20_000
    rows = torch.tensor(logits, dtype=torch.float32).expand(count, -1)
    found = draw(rows, torch.from_numpy(np.random.default_rng(2).random(count)), temperature, top_p)
    counts = np.bincount(found.numpy(), minlength=12)
    assert counts[kept].sum() == count and 3 < len(kept) <= 12
    assert chisquare(counts[kept], expected[kept] / mass * count).pvalue > 0.01


def test_the_set_is_that_of_transformers():
    """Rows from nearly uniform to nearly certain, of a vocabulary as large as a model's."""
    logits = torch.randn(8, 30_000, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    logits *= torch.tensor([0.1, 0.5, 1, 2, 3, 5, 10, 50], dtype=torch.float32)[:, None]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)])
    cumulative = warpers(None, logits).double().softmax(-1).cumsum(-1).numpy()
    for u in np.random.default_rng(3).random(20):
        found = draw(logits, torch.full((8,), u, dtype=torch.float64), 0.7, 0.9)
        for row, token in zip(cumulative, found.tolist(), strict=True):
            low, high = row[token - 1] if token else 0.0, row[token]
            assert high > low and low - 1e-5 < u < high + 1e-5


def test_an_answer_by_hand(tokenizer):
    """Token by token, without a cache: the model's logits, the set, and the uniforms of the seed, prompt and sample."""
    model, prompt, sampling = steep(), PROMPTS[0], Sampling(6, 12, 0.9, 0.8, seed=7)
    found = generate(TransformersEngine(model, tokenizer), [prompt, PROMPTS[2]], sampling)[0]
    for j, answer in enumerate(found):
        key = hashlib.sha256(f"7 {hashlib.sha256(prompt.encode()).hexdigest()} {j}".encode()).digest()
        uniforms = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).random(12)
        text = ids(prompt)
        for u in uniforms:
            with torch.no_grad():
                logits = model(torch.tensor([text])).logits[0, -1].numpy() / 0.9
            probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            order = np.argsort(-probs)
            kept = order[: 1 + int((probs[order].cumsum() < 0.8).sum())]
            probs[np.setdiff1d(np.arange(VOCAB), kept)] = 0
            text.append(int(np.searchsorted(probs.cumsum(), u * probs.sum(), side="right")))
        end = text.index(2) if 2 in text else None
        assert ids(answer.text) == text[3:end] and answer.finished == (end is not None)
    assert {answer.finished for answer in found} == {True, False} and len(set(found)) == 6


def test_temperature_0_takes_the_likeliest(tokenizer):
    model = steep()
    found = generate(TransformersEngine(model, tokenizer), PROMPTS, Sampling(2, 6, 0.0))
    for prompt, answers in zip(PROMPTS, found, strict=True):
        text = ids(prompt)
        for _ in range(6):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        assert [ids(a.text) for a in answers] == [text[-6:]] * 2
    assert found == generate(TransformersEngine(model, tokenizer), PROMPTS, Sampling(2, 6, 0.7, 1e-9))


def test_an_answer_does_not_depend_on_its_company(tokenizer):
    engine, sampling = TransformersEngine(steep(), tokenizer), Sampling(3, 30, 1.0, 0.95, seed=3)
    found = generate(engine, PROMPTS, sampling)
    for size in (1, 4, 100):
        assert generate(engine, PROMPTS, sampling, batch_size=size) == found
    assert generate(engine, PROMPTS[::-1], sampling) == found[::-1]
    assert generate(engine, PROMPTS[1:2], sampling) == found[1:2]
    assert generate(engine, [PROMPTS[0]] * 2, Sampling(2, 30, 1.0, 0.95, seed=3)) == [found[0][:2]] * 2
    other = generate(engine, PROMPTS, Sampling(3, 30, 1.0, 0.95, seed=4))
    assert len({a for answers in (*found, *other) for a in answers}) == 30
    assert {a.finished for answers in found for a in answers} == {True, False}
    for answer in (a for answers in found for a in answers):
        assert (len(ids(answer.text)) < 30) == answer.finished and 2 not in ids(answer.text)


# --- the model


def test_the_models_generation_config_only_says_where_to_end(tokenizer, capfd):
    sampling, odd = Sampling(3, 30, 1.0, 1.0), steep()
    plain = generate(TransformersEngine(steep(), tokenizer), PROMPTS, sampling)
    odd.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=2, top_p=0.1, repetition_penalty=9.0, no_repeat_ngram_size=1,
        max_length=4, min_new_tokens=20, suppress_tokens=[*range(3, 60)], num_beams=3, num_return_sequences=2,
        stop_strings="w09", eos_token_id=[8, 33], pad_token_id=5, use_cache=False, return_dict_in_generate=True,
    )  # fmt: skip
    wanted = []
    for answer in (a for answers in plain for a in answers):
        words = ids(answer.text)
        end = min([words.index(i) for i in (8, 33) if i in words], default=None)
        wanted.append(Answer(" ".join(f"w{i:02}" for i in words[:end]), end is not None or answer.finished))
    capfd.readouterr()
    for model in (odd, adapted(odd)):  # with adapters that are still zero
        kept = odd.generation_config
        found = generate(TransformersEngine(model, tokenizer), PROMPTS, sampling)
        assert [a for answers in found for a in answers] == wanted and odd.generation_config is kept
    assert capfd.readouterr() == ("", "")
    assert sum(a.finished for a in wanted) > sum(a.finished for answers in plain for a in answers)


def test_an_attached_model_answers_as_the_plain_one(tokenizer):
    sampling = Sampling(2, 10)
    found = [generate(TransformersEngine(model, tokenizer), PROMPTS, sampling)
             for model in (tiny_llama(), attached(tiny_store([]), std=1.0))]  # fmt: skip
    assert found[0] == found[1]


def test_nothing_is_changed_also_after_an_error(tokenizer):
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()  # a part that is frozen while the rest trains
    tokenizer.padding_side = "right"
    config = model.generation_config

    def state():
        modes = [module.training for module in model.modules()]
        numpy = np.random.get_state()  # noqa: NPY002
        return (str(numpy), str(random.getstate()), modes, tokenizer.padding_side, torch.is_grad_enabled(),
                torch.get_rng_state().tolist(), model.generation_config is config)  # fmt: skip

    before, engine = state(), TransformersEngine(model, tokenizer)
    first = generate(engine, PROMPTS, Sampling(1, 5))
    assert state() == before and before[-1] and True in before[2] and False in before[2]
    assert generate(engine, PROMPTS, Sampling(1, 5)) == first  # no dropout
    model.lm_head.weight.data[7] = torch.nan
    for temperature in (0.0, 0.7):
        with pytest.raises(RuntimeError, match="logits are not finite at token 0"):
            generate(engine, PROMPTS, Sampling(1, 5, temperature))
        assert state() == before


# --- batches and errors


def test_batches_are_of_similar_length_and_samples_stay_together(capfd):
    engine = Echo()
    assert generate(engine, PROMPTS, Sampling(2), batch_size=4, progress="Answers")[2][1].text.startswith("[9, 10, 11,")
    assert [[len(tokens) for tokens in batch] for batch in engine.batches] == [[7, 7, 3, 3], [3, 3, 2, 2], [1, 1]]
    assert engine.batches[0][2] == engine.batches[0][3]
    assert "Answers" in (bar := capfd.readouterr().err) and "10/10" in bar
    assert generate(unused, [], Sampling()) == [] and capfd.readouterr().err == ""


def test_bad_arguments(tokenizer):
    cases = {
        "samples": [0, -1, 1.0, True],
        "max_new_tokens": [0, 2.5],
        "temperature": [-0.1, float("nan"), float("inf"), 1e-9],
        "top_p": [0.0, 1.1, -0.5, float("nan")],
        "seed": [-1, 2**64, 0.5],
    }
    for name, values in cases.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} must be .*, got {value}$"):
                Sampling(**{name: value})
    assert Sampling(seed=2**64 - 1, top_p=1, temperature=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        generate(unused, PROMPTS, Sampling(), batch_size=0)
    with pytest.raises(TypeError, match="got one text"):
        generate(unused, PROMPTS[0], Sampling())
    with pytest.raises(TypeError, match=r"prompts\[1\] must be a text"):
        generate(unused, [PROMPTS[0], [{"role": "user", "content": "Why?"}]], Sampling())
    with pytest.raises(TypeError, match=r"engine must be one, as TransformersEngine.*, got LlamaForCausalLM"):
        generate(tiny_llama(), PROMPTS, Sampling())
    with pytest.raises(ValueError, match="keep needs identity"):
        generate(unused, PROMPTS, Sampling(), keep=Path("nowhere"))
    engine = TransformersEngine(tiny_llama(max_position_embeddings=9), tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[2\] has 7 tokens, which with max_new_tokens 3 .* context of 9"):
        generate(engine, PROMPTS, Sampling(1, 3))
    assert generate(engine, PROMPTS, Sampling(1, 2))[2][0]  # to the last place
    with pytest.raises(ValueError, match=r"prompts\[1\] has no tokens"):
        generate(engine, [PROMPTS[1], ""], Sampling(1, 2))
    with pytest.raises(ValueError, match="no pad token"):
        TransformersEngine(tiny_llama(), types.SimpleNamespace(pad_token_id=None))


def test_what_is_there_is_not_made_again(tmp_path, tokenizer, capfd):
    keep, engine = tmp_path / "answers", TransformersEngine(steep(), tokenizer)
    few = generate(engine, PROMPTS[:2], Sampling(1, 5), keep=keep, identity={})
    assert generate(unused, PROMPTS[1::-1], Sampling(1, 5), keep=keep, identity={}) == few[::-1]
    more = generate(engine, PROMPTS, Sampling(2, 5), keep=keep, identity={}, progress="Answers")
    assert more == generate(engine, PROMPTS, Sampling(2, 5)) and [a[:1] for a in more[:2]] == few
    bar = capfd.readouterr().err
    assert "2/10" in bar and "10/10" in bar and "0/10" not in bar.replace("10/10", "")
    assert len(keep.read_text().splitlines()) == 11


# --- vLLM


@dataclass
class SamplingParams:
    """The fields of vLLM's that matter here, with its defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = 16


def stub_of_vllm(tokenizer):
    class LLM:
        def __init__(self, model, *, tokenizer=None, dtype="auto", **kwargs):
            self.made_of = model, dtype, kwargs
            self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=20))
            self.calls = []

        def get_tokenizer(self):
            return tokenizer

        def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None):
            assert len(prompts) == len(sampling_params) and not use_tqdm
            self.calls += zip(prompts, sampling_params, strict=True)
            return [
                types.SimpleNamespace(
                    outputs=[types.SimpleNamespace(text=f"{p} {s.seed}", finish_reason=("stop", "length")[s.seed % 2])]
                )
                for p, s in zip(prompts, sampling_params, strict=True)
            ]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    return module


def test_vllm(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RuntimeError, match=r"vllm cannot be imported.*pip install vllm; it needs a GPU"):
        VLLMEngine("folder")
    monkeypatch.setitem(sys.modules, "vllm", stub_of_vllm(tokenizer))
    engine = VLLMEngine("folder", dtype="bfloat16", max_model_len=20)
    assert engine.llm.made_of == ("folder", "bfloat16", {"max_model_len": 20})
    sampling = Sampling(4, 8, 0.6, 0.95, seed=1)
    found = generate(engine, PROMPTS, sampling, batch_size=7)
    params = [p for _, p in engine.llm.calls]
    fields = {(p.n, p.temperature, p.top_p, p.max_tokens, p.top_k, p.stop) for p in params}
    assert fields == {(1, 0.6, 0.95, 8, 0, None)}
    assert len({p.seed for p in params}) == 20 and all(0 <= p.seed < 2**63 for p in params)
    assert [list(prompt) for prompt, _ in engine.llm.calls] == [["prompt_token_ids"]] * 20
    assert found[1][2].text.startswith(f"{{'prompt_token_ids': {ids(PROMPTS[1])}}} ")
    for answer in (a for answers in found for a in answers):
        assert answer.finished == (int(answer.text.split()[-1]) % 2 == 0)
    assert generate(engine, PROMPTS[::-1], sampling) == found[::-1]
    with pytest.raises(ValueError, match=r"prompts\[2\] has 7 tokens, .* context of 20"):
        generate(engine, PROMPTS, Sampling(1, 14))
