"""The experiments of benchmarks/collapse: the world's judgement, the comparison at equal collapse, and what the
committed results say of the planted arms."""

import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.collapse import arms as arms_module
from benchmarks.collapse import report, trial, world
from benchmarks.collapse import run as run_module
from benchmarks.collapse.arms import AGAIN, CE, FORMER, SFR, SHARE, SHUFFLED, THIRD, TRUTH, Objective, arms, named
from benchmarks.collapse.compare import PRIMARY, at_equal_overlap, by_prompt, differences, over_worlds, proven
from benchmarks.collapse.run import results_of, run
from benchmarks.collapse.world import MEANINGS, PREFIX, STYLES, VOCABULARY, World
from sfr_kernels import SFRConfig, SupervisedRows, linear_cross_entropy, sfr_loss

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
    one = objective(name)
    arm, weight, (rows, targets) = one.arm, one.weight, rows_and_targets(one.config)
    hidden = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.nn.init.normal_(one.head.output_proj.weight, std=0.1)

    def loss():
        state = one.shuffle.get_state()
        value = one.loss(hidden, rows, targets, 1, measure=True)
        one.shuffle.set_state(state)
        return torch.autograd.grad(value, hidden)[0]

    plain = torch.autograd.grad(linear_cross_entropy(hidden, weight, rows), hidden)[0]
    flow = loss() - plain
    share = flow.norm().item() / plain.norm().item()
    assert share > 0 and one.share == pytest.approx(share, rel=1e-3)
    loss()
    assert one.share == pytest.approx(arm.share or share, rel=1e-3)


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


def test_answers_order_and_head_are_drawn_apart(monkeypatch):
    made = {}

    def generator(*key):
        made[key] = arms_module.generator(*key)
        return made[key]

    monkeypatch.setattr(trial, "generator", generator)
    monkeypatch.setattr(World, "judge", lambda self, model: {})
    arm = next(arm for arm in arms(trial.CONFIG, 1) if arm.name == "mse: norm, head first")
    for each in (arm, AGAIN):
        trial.trial(WORLD, world.new_model(0), each, 0, steps=1)
    assert {key[0] for key in made} == {"answers", "order", "head"} and len(made) == 4  # AGAIN has its own order
    states = [arms_module.generator(*key).get_state() for key in made]
    assert not any(torch.equal(x, y) for x, y in itertools.combinations(states, 2))
    assert all(not torch.equal(made[key].get_state(), state) for key, state in zip(made, states, strict=True))  # used


def rows_and_targets(config: SFRConfig, length: int = 40):
    labels = torch.randint(22, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    rows = SupervisedRows.from_labels(labels, config)
    return rows, WORLD.embed(labels.flatten(), rows.segments)


def objective(name: str) -> Objective:
    arm = next(arm for arm in arms(trial.CONFIG, 1) if arm.name == name)
    weight = torch.randn(VOCABULARY, 96, generator=torch.Generator().manual_seed(0))
    return Objective(arm, weight, world.TARGET, 3)


def test_the_control_has_the_targets_of_others():
    one, control = objective(SFR), objective(SHUFFLED)
    rows, targets = rows_and_targets(one.config)
    assert one._drawn(rows, targets, 1)[1] is targets
    for step in (1, 2):
        shuffled = control._drawn(rows, targets, step)[1]
        kept = (shuffled == targets).all(1)
        assert kept.float().mean() < 0.2 and sorted(shuffled.tolist()) == sorted(targets.tolist())


def test_times_are_below_the_latest():
    name = "SFR: norm, head first, t < 0.6"
    rows, targets = rows_and_targets(objective(name).config, 200)
    rows, _, drawn = objective(name)._drawn(rows, targets, 1)
    assert 0.5 < drawn["times"].max() < 0.6 and drawn["times"].min() < 0.1


@pytest.mark.parametrize("name", [SFR, "MTP: norm, head first"])
def test_a_head_that_is_fitted_first_has_learnt(name):
    one = objective(name)
    rows, targets = rows_and_targets(one.config)
    hidden = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def flow() -> float:
        rows_, targets_, drawn = one._drawn(rows, targets, 1)
        return sfr_loss(hidden, one.weight, one.head, rows_, targets_, config=one.config, **drawn).flow.item()

    before = flow()
    one.fit_head([(hidden.detach(), rows, targets)] * 60, 3e-3)
    assert flow() < 0.8 * before and one.weight.grad is None


def test_an_arm_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="there is no arm 'head first'; there are: CE; SFR"):
        named(["CE", "head first"], arms(trial.CONFIG, 1))


def doubled(folder: Path, job: dict) -> dict:
    (folder / f"ran-{job['n']}").write_text("")
    if (folder / "slow").exists():
        time.sleep(0.1)
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


def test_a_run_that_is_interrupted_begins_no_more_jobs(tmp_path, monkeypatch):
    def interrupted(futures, **_):
        yield next(iter(futures))
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "tqdm", interrupted)
    path, jobs = tmp_path / "results.jsonl", [{"n": n} for n in range(40)]
    (tmp_path / "slow").touch()
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path, jobs, doubled, 1)
    assert len(results_of(path)) == 1 and len([*tmp_path.glob("ran-*")]) < 10


def test_the_interval_over_worlds_is_students():
    runs = {("CE", w, s): curve(11, 0.2, 0, np.random.default_rng(w)) for w in range(5) for s in (0, 1)}
    gains, seeds = (0.1, 0.2, 0.3, 0.4, 0.5), (0, 1)
    runs |= {("x", w, s): [p | {"nll": p["nll"] - gains[w]} for p in runs["CE", w, s]] for w in range(5) for s in seeds}
    found = over_worlds(runs, "x", "CE")
    half = 2.776445 * np.sqrt(0.025 / 5)  # of four degrees of freedom
    assert (found.mean, found.low, found.high) == pytest.approx((-0.3, -0.3 - half, -0.3 + half), abs=1e-6)


def test_the_planted_arms_are_what_the_committed_results_say_they_are():
    runs = report.world_runs(RESULTS / "collapse-world.jsonl")
    for copy, other in ((AGAIN, CE), (THIRD, CE), (THIRD, AGAIN)):
        found = differences(runs, copy.name, other.name)
        for outcome in (PRIMARY, report.VALIDITY, "nll at the end", "validity at the end"):
            assert found[outcome].low <= 0 <= found[outcome].high, (copy.name, other.name, outcome)
    truth = differences(runs, TRUTH.name, CE.name)
    assert truth[report.VALIDITY].low > 0 and truth["validity at the end"].low > 0 and truth["nll at the end"].high < 0


def test_the_setting_that_is_shipped_is_better_than_what_it_was_to_be_better_than():
    runs = report.world_runs(RESULTS / "collapse-world.jsonl")
    assert sum(key[0] == SFR for key in runs) >= 20
    for other in (CE.name, "MTP", SHUFFLED, FORMER):
        found = differences(runs, SFR, other)
        assert found[PRIMARY].high < 0 < found[report.VALIDITY].low, other
        assert over_worlds(runs, SFR, other).high < 0, other
    won, shipped = next(arm for arm in arms(trial.CONFIG, 400) if arm.name == SFR).config, SFRConfig()
    sizes = {*trial.CONFIG, "head_steps"}
    assert won.head_steps and shipped.head_steps
    assert {k: v for k, v in won.to_dict().items() if k not in sizes} == {
        k: v for k, v in shipped.to_dict().items() if k not in sizes
    }


def test_the_tables_are_of_the_committed_results():
    assert report.main(["--check"]) == 0
