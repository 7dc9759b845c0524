"""The experiments of benchmarks/collapse: the world's judgement, the comparison at equal collapse, and what the
committed results say of the planted arms."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.collapse import report, trial, world
from benchmarks.collapse.arms import AGAIN, CE, FORMER, SFR, SHARE, SHUFFLED, THIRD, TRUTH, Objective, arms, named
from benchmarks.collapse.compare import PRIMARY, at_equal_overlap, by_prompt, differences, proven, world_means
from benchmarks.collapse.run import results_of, run
from benchmarks.collapse.world import MEANINGS, PREFIX, STYLES, VOCABULARY, World
from sfr_kernels import SFRConfig, SupervisedRows, linear_cross_entropy

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
WORLD = World(7)


def judged(monkeypatch, probability) -> dict[str, float]:
    """What the world says of a model that believes `probability(is the style asked for, of the meaning)`."""

    def log_likelihood(model, sequences):
        values = []
        for sequence in sequences.tolist():
            style, prompt = sequence[0], (sequence[1] - STYLES) * 5 + sequence[2] - STYLES - 8
            values.append(-math.inf)
            for other in range(STYLES):
                for meaning in range(MEANINGS):
                    one = (torch.tensor([x]) for x in (other, prompt, meaning))
                    if WORLD.answer(*one)[0].tolist() == sequence[PREFIX:]:
                        values[-1] = math.log(probability(style == other, WORLD.probabilities[prompt, meaning].item()))
        return torch.tensor(values, dtype=torch.float64)

    monkeypatch.setattr(world, "log_likelihood", log_likelihood)
    monkeypatch.setattr(world, "HELD_OUT", 1)
    return World(7).judge(None)


def test_a_model_that_knows_the_truth_is_judged_perfect(monkeypatch):
    found = judged(monkeypatch, lambda own, meaning: meaning if own else 1e-300)
    wanted = dict(nll=0, overlap=0, validity=1, coverage=1)
    assert found == pytest.approx(wanted, abs=1e-9)


def test_a_model_without_styles_is_judged_collapsed(monkeypatch):
    found = judged(monkeypatch, lambda own, meaning: meaning / STYLES)
    assert found == pytest.approx(dict(nll=math.log(STYLES), overlap=1, validity=1 / STYLES, coverage=1), abs=1e-9)


def test_a_model_of_one_meaning_covers_as_much_as_the_likeliest_has(monkeypatch):
    found = judged(monkeypatch, lambda own, meaning: 0.5 * (meaning == 0.4) + 1e-12 if own else 1e-300)
    assert found["validity"] == pytest.approx(0.5) and found["coverage"] == pytest.approx(0.4)


def test_answers_are_of_the_style_and_the_prompt():
    g = torch.Generator().manual_seed(0)
    tokens = WORLD.corpus(WORLD.known, 2, g)
    assert tokens.shape == (30 * STYLES * 2, PREFIX + 6) and tokens.max() < VOCABULARY
    assert not {*WORLD.known.tolist()} & {*WORLD.held_out.tolist()}
    concept = (tokens[:, PREFIX:] - 22) // 3
    assert torch.equal(WORLD.forms[tokens[:, :1], concept], (tokens[:, PREFIX:] - 22) % 3)


def test_embeddings_are_bags_of_the_words_ahead():
    labels = torch.tensor([-100, 22, 25, -100, 30])
    found = WORLD.embed(labels, torch.tensor([[0, 3], [3, 5], [3, 4]]))
    wanted = torch.stack([WORLD.words[0] + WORLD.words[3], WORLD.words[8], torch.zeros(world.TARGET)])
    assert torch.allclose(found, torch.nn.functional.normalize(wanted, dim=1), atol=1e-6)


def curve(steps: int, speed: float, gain: float, rng) -> list[dict]:
    """A run whose NLL is a line over overlap, `gain` below that of others, with noise."""
    overlap = np.exp(-speed * np.arange(steps))
    noise = 0.02 * rng.standard_normal()
    return [dict(overlap=x, nll=1 + x - gain + noise, validity=1 - x, coverage=0.5) for x in overlap]


def test_runs_are_compared_at_equal_overlap_not_at_equal_steps():
    rng = np.random.default_rng(0)
    plain = {("CE", w, s): curve(11, 0.2, 0, rng) for w in range(5) for s in range(4)}
    slower = {("slow", *key[1:]): curve(11, 0.1, 0, rng) for key in plain}  # looks worse at equal steps
    better = {("better", *key[1:]): curve(11, 0.15, 0.05, rng) for key in plain}
    runs = plain | slower | better
    assert at_equal_overlap(curve(11, 0.1, 0.3, rng), plain["CE", 0, 0], "validity") == pytest.approx(0, abs=2e-3)
    found = {name: differences(runs, name, "CE") for name in ("slow", "better")}
    assert found["slow"]["validity at the end"].high < -0.2 and found["slow"]["overlap at the end"].low > 0.2
    assert found["slow"][PRIMARY].low < 0 < found["slow"][PRIMARY].high
    assert found["better"][PRIMARY].mean == pytest.approx(-0.05, abs=0.02) and proven(found, PRIMARY) == {"better"}


def test_answers_are_compared_over_prompts():
    prompts = np.arange(8.0)
    answers = [
        dict(arm=arm, seed=seed, values={"m": [*(prompts + gain * (1 + seed) + 0.01 * prompts * gain)]})
        for arm, gain in (("CE", 0.0), ("x", 1.0)) for seed in range(3)
    ]  # fmt: skip
    found = by_prompt(answers, "x", "CE")["m"]
    assert found.mean == pytest.approx(2 + 0.01 * 3.5) and found.low > 1.9


@pytest.mark.parametrize("arm", arms(trial.CONFIG, trial.HEAD_STEPS), ids=lambda arm: arm.name)
def test_every_arm_trains(arm, monkeypatch):
    config = arm.config and replace(arm.config, head_steps=min(arm.config.head_steps, 2))
    monkeypatch.setattr(trial, "EVERY", 2)
    monkeypatch.setattr(World, "judge", lambda self, model: {"sum": model.embed_tokens.weight.sum().item()})
    history = trial.trial(WORLD, world.new_model(0), replace(arm, config=config), 0, steps=4)
    assert [point["step"] for point in history] == [0, 2, 4] and history[0]["sum"] != history[2]["sum"]
    assert ("share" in history[2]) == (arm.config is not None)
    assert ("flow_weight" in history[2]) == (arm.config is not None)


@pytest.mark.parametrize("name", [SHARE, SHUFFLED, "mse", "SFR official"])
def test_a_share_is_of_the_gradients_at_h_and_sets_the_next_step(name):
    arm = next(arm for arm in arms(trial.CONFIG, 1) if arm.name == name)
    torch.manual_seed(0)
    weight, hidden = torch.randn(VOCABULARY, 96), torch.randn(1, 20, 96, requires_grad=True)
    labels = torch.randint(22, VOCABULARY, (1, 20))
    rows = SupervisedRows.from_labels(labels, arm.config)
    targets = WORLD.embed(labels.flatten(), rows.segments)
    objective = Objective(arm, weight, world.TARGET, 3)
    torch.nn.init.normal_(objective.head.output_proj.weight, std=0.1)

    def loss():
        state = objective.shuffle.get_state()
        value = objective.loss(hidden, rows, targets, 1, measure=True)
        objective.shuffle.set_state(state)
        return torch.autograd.grad(value, hidden)[0]

    plain = torch.autograd.grad(linear_cross_entropy(hidden, weight, rows), hidden)[0]
    flow = loss() - plain
    share = flow.norm().item() / plain.norm().item()
    assert share > 0 and objective.share == pytest.approx(share, rel=1e-3)
    loss()
    assert objective.share == pytest.approx(arm.share or share, rel=1e-3)


def test_arms_share_the_answers_and_the_order_but_where_they_say_so(monkeypatch):
    batches, embed = [], World.embed
    monkeypatch.setattr(World, "embed", lambda self, labels, x: batches.append(labels) or embed(self, labels, x))
    monkeypatch.setattr(Objective, "loss", lambda self, hidden, *_, **__: hidden.sum())
    monkeypatch.setattr(World, "judge", lambda self, model: {})

    def seen(arm):
        batches.clear()
        trial.trial(WORLD, world.new_model(0), arm, 0, steps=30)  # one pass over the answers
        return torch.stack(batches[-30:])

    plain = next(arm for arm in arms(trial.CONFIG, 1) if arm.name == "mse: norm, head first")
    ce, mse, again, third = (seen(arm) for arm in (CE, plain, AGAIN, THIRD))
    assert torch.equal(ce, mse)
    for x, y in ((ce, again), (ce, third), (again, third)):
        assert not torch.equal(x, y)
        assert sorted(x.view(-1, PREFIX + 6).tolist()) == sorted(y.view(-1, PREFIX + 6).tolist())


def test_an_arm_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="there is no arm 'head first'; there are: CE; SFR"):
        named(["CE", "head first"], arms(trial.CONFIG, 1))


def doubled(folder: Path, job: dict) -> dict:
    (folder / f"ran-{job['n']}").write_text("")
    if (folder / f"fail-{job['n']}").exists():
        raise ValueError("no luck")
    return {"twice": 2 * job["n"]}


def test_runs_go_on_where_they_were_stopped(tmp_path):
    path, jobs = tmp_path / "results.jsonl", [{"n": n} for n in range(3)]
    path.write_text('{"device": {}}\n{"n": 1, "twice": 2}\n{"n": 2, "twi')  # cut short
    assert [x["twice"] for x in run(path, tmp_path, jobs, doubled, 1)] == [0, 2, 4]
    assert [p.name for p in sorted(tmp_path.glob("ran-*"))] == ["ran-0", "ran-2"]
    assert [x["n"] for x in results_of(path)] == [1, 0, 2] and "device" in json.loads(path.read_text().split("\n")[0])


def test_a_job_that_fails_costs_no_other(tmp_path):
    path, jobs = tmp_path / "results.jsonl", [{"n": n} for n in range(3)]
    (tmp_path / "fail-0").touch()
    with pytest.raises(RuntimeError, match=r"1 of 3 jobs failed, the first {'n': 0}: no luck"):
        run(path, tmp_path, jobs, doubled, 1)
    assert [x["n"] for x in results_of(path)] == [1, 2]


def test_the_planted_arms_are_what_the_committed_results_say_they_are():
    runs = report.world_runs(RESULTS / "collapse-world.jsonl")
    for copy, other in ((AGAIN, CE), (THIRD, CE), (THIRD, AGAIN)):
        found = differences(runs, copy.name, other.name)
        for outcome in (PRIMARY, report.VALIDITY, "nll at the end", "validity at the end"):
            assert found[outcome].low <= 0 <= found[outcome].high, (copy.name, other.name, outcome)
    truth = differences(runs, TRUTH.name, CE.name)
    assert truth[report.VALIDITY].low > 0 and truth["validity at the end"].low > 0 and truth["nll at the end"].high < 0


def test_the_setting_that_is_shipped_is_the_one_that_won():
    runs = report.world_runs(RESULTS / "collapse-world.jsonl")
    assert sum(key[0] == SFR for key in runs) >= 20
    for other in (CE.name, "MTP", SHUFFLED, FORMER):
        found = differences(runs, SFR, other)
        assert found[PRIMARY].high < 0 < found[report.VALIDITY].low, other
        assert max(world_means(runs, SFR, other)) < 0, other
    won, shipped = next(arm for arm in arms(trial.CONFIG, 400) if arm.name == SFR).config, SFRConfig()
    sizes = {*trial.CONFIG, "head_steps"}
    assert won.head_steps and shipped.head_steps
    assert {k: v for k, v in won.to_dict().items() if k not in sizes} == {
        k: v for k, v in shipped.to_dict().items() if k not in sizes
    }


def test_the_tables_are_of_the_committed_results():
    assert report.main(["--check"]) == 0
