"""Futures sampled from a velocity head: of flows that are known exactly, of a trained head, and by the command."""

import html
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from corpora import CONFIG, TARGET, smollm2
from tiny import HIDDEN, tiny_llama

from sfr_kernels import SFRConfig, SFRLoss, SupervisedRows, VelocityHead, flow_matching_loss
from sfr_kernels.commands import main
from sfr_kernels.commands.futures import Measured, _pieces, _show
from sfr_kernels.evaluation import futures
from sfr_kernels.evaluation.futures import sample_futures, spread, spread_together
from sfr_kernels.training.checkpoint import save_head

pytestmark = pytest.mark.usefixtures("one_thread")
STD, SCALE = 0.7, 3.0
OPTIONS = dict(steps=32, target_scale=SCALE, source_std=STD, seed=5)


class ToTwoPoints(VelocityHead):
    """The exact flow from noise of STD to SCALE · e_1 with the probability that the hidden state names, else to
    SCALE · e_2: the velocities to either, weighted by how likely x_t is on the way there."""

    def __init__(self):
        super().__init__(1, 6)

    def forward(self, x, t, hidden):
        ends = SCALE * torch.eye(6)[:2]
        prior = torch.cat([hidden, 1 - hidden], dim=1).log()
        near = -torch.cdist(x, t * ends).square() / (2 * (1 - t) ** 2 * STD**2)
        return (torch.softmax(prior + near, dim=1) @ ends - x) / (1 - t)


def test_a_flow_to_one_point_ends_there_after_any_number_of_steps():
    for steps in (1, 2, 7):
        samples = sample_futures(ToTwoPoints(), torch.tensor([[1.0], [0.0]]), noises=5, **OPTIONS | dict(steps=steps))
        assert samples.shape == (2, 5, 6) and samples.dtype == torch.float32
        torch.testing.assert_close(samples, torch.eye(6)[:2, None].expand(2, 5, 6), atol=1e-5, rtol=0)
        assert spread(samples).max() < 1e-6
        assert spread_together(samples).item() == pytest.approx(0.5, abs=1e-5)  # two of the four pairs are at 1


def test_a_flow_to_two_points_ends_at_each_as_often_as_it_is_likely():
    shares = torch.tensor([[0.25], [0.5], [1.0], [0.25]])
    samples = sample_futures(ToTwoPoints(), shares, noises=4000, **OPTIONS)
    near = torch.cdist(samples, torch.eye(6)[:2].expand(4, 2, 6))
    assert (near.min(dim=2).values < 0.05).float().mean() > 0.98  # a few are still between them at the last step
    first = (near.argmin(dim=2) == 0).float().mean(dim=1)
    torch.testing.assert_close(first, shares[:, 0], atol=0.03, rtol=0)  # four standard errors
    # 2 · w (1 − w) · the distance of e_1 and e_2, which is 1
    torch.testing.assert_close(spread(samples), torch.tensor([0.375, 0.5, 0.0, 0.375]), atol=0.02, rtol=0)
    assert torch.equal(samples[0], samples[3])  # the same noises at every token


def test_noise_is_of_the_seed_and_batches_change_nothing(monkeypatch):
    hidden = torch.rand(9, 1)
    whole = sample_futures(ToTwoPoints(), hidden, noises=4, **OPTIONS)
    monkeypatch.setattr(futures, "_ROWS", 7)  # which splits the noises of a token
    torch.testing.assert_close(sample_futures(ToTwoPoints(), hidden, noises=4, **OPTIONS), whole)
    torch.testing.assert_close(sample_futures(ToTwoPoints(), hidden[3:5], noises=4, **OPTIONS), whole[3:5])
    new = VelocityHead(3, 50, width=8)  # whose velocity is zero
    noise, other = (
        sample_futures(new, torch.ones(1, 3), noises=200, **OPTIONS | dict(seed=seed)) * SCALE for seed in (0, 1)
    )
    assert noise.std().item() == pytest.approx(STD, rel=0.03) and not torch.isclose(noise, other).any()


def test_spread_by_hand():
    three = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]]])  # at distances 1, 2 and 1
    assert spread(three).tolist() == pytest.approx([4 / 3])
    assert spread_together(three).item() == pytest.approx(4 / 3)  # one token
    two = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [-2.0, 0.0]]])
    assert spread(two).tolist() == pytest.approx([1.0, 2.0])
    assert spread_together(two).item() == pytest.approx((1 + 2 + 1 + 2) / 4)


def test_what_cannot_be_sampled():
    head, hidden = VelocityHead(3, 4), torch.ones(2, 3)
    for changed, message in (
        (dict(noises=0), "noises must be at least 1, got 0"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(source_std=0.0), "source_std must be positive, got 0.0"),
        (dict(target_scale=0.0), "target_scale must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_futures(head, hidden, **dict(noises=2, **OPTIONS) | changed)
    with pytest.raises(ValueError, match=r"hidden must be \(n, 3\), got \(2, 4\)"):
        sample_futures(head, torch.ones(2, 4), noises=2, **OPTIONS)
    with pytest.raises(TypeError, match="hidden must be floating-point"):
        sample_futures(head, hidden.long(), noises=2, **OPTIONS)
    for measure in (spread, spread_together):
        with pytest.raises(ValueError, match="k of at least 2"):
            measure(torch.ones(3, 1, 4))


def test_a_trained_head_is_open_at_forks_and_locked_elsewhere():
    """Even positions have one target, odd ones two opposite targets: a spread of 0, and of 2 · ½ · ½ · 2 = 1."""
    torch.manual_seed(0)
    config = SFRConfig(width=64, stride=1, min_tokens=1)
    rows = SupervisedRows.from_labels(torch.ones(1, 257, dtype=torch.int64), config)
    fork, head = rows.rows % 2 == 1, VelocityHead.from_config(config, 2, 4)
    hidden = 16 * F.one_hot(torch.arange(257) % 2, 2)[None].float()
    optimizer, targets = torch.optim.Adam(head.parameters(), lr=3e-3), torch.zeros(rows.num_anchors, 4)
    for step in range(300):
        side = torch.randint(2, (len(rows),)) * 2.0 - 1
        targets[rows.anchor] = torch.where(fork[:, None], side[:, None] * torch.eye(4)[1], torch.eye(4)[0])
        loss = flow_matching_loss(hidden, head, rows, targets, seed=step, config=config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    samples = sample_futures(head, hidden[0, :2], noises=64, steps=16, target_scale=2.0, source_std=1.0, seed=0)
    locked, forked = spread(samples).tolist()
    assert locked < 0.1 and forked > 0.8  # 0.04 and 1.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a head that was not trained, where `train` would leave them."""
    folder, tokenizer = tmp_path_factory.mktemp("futures"), smollm2()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "run" / "model")
    tokenizer.save_pretrained(folder / "run" / "model")
    save_head(folder / "run" / "model", random_loss())
    return folder


def random_loss(config: SFRConfig = CONFIG, hidden_size: int = HIDDEN) -> SFRLoss:
    torch.manual_seed(1)
    head = None if config.loss == "cka" else VelocityHead.from_config(config, hidden_size, TARGET)
    if head is not None:
        torch.nn.init.normal_(head.output_proj.weight, std=0.3)
    return SFRLoss(config, head)


TEXT = "One <b>bold</b> & ünï 🏴 day."


def test_the_command_shows_a_number_for_each_token(folder, tmp_path, capsys, monkeypatch):
    out, tokenizer = tmp_path / "out", smollm2()
    line = ["futures", str(folder / "run"), "--prompt", "Why <i>?", "--system", "Be a monk.", "--out", str(out)]
    assert main([*line, "--text", TEXT, "--noises", "8", "--steps", "4", "--seed", "3"]) == 0
    shown, result = capsys.readouterr().out, json.loads((out / "futures.json").read_text())

    said = [{"role": "system", "content": "Be a monk."}, {"role": "user", "content": "Why <i>?"}]
    before = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    first, response = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (before, TEXT + "<|im_end|>"))
    assert result["context"] == before and "".join(result["tokens"]) == TEXT + "<|im_end|>"
    assert result["tokens"][:2] == ["One", " <"] and len(result["tokens"]) == len(response)
    model = tiny_llama(vocab_size=len(tokenizer)).eval()
    with torch.no_grad():
        inner = model(torch.tensor([first + response]), output_hidden_states=True).hidden_states[-1][0]
    head = random_loss().head
    hidden = inner[len(first) - 1 : -1]  # of the token before each
    samples = sample_futures(head, hidden, noises=8, steps=4, target_scale=TARGET**0.5, source_std=1.0, seed=3)
    assert result["spread"] == pytest.approx(spread(samples).tolist(), rel=1e-4)
    assert max(result["spread"]) - min(result["spread"]) > 0.01
    # CONFIG's min_tokens is 3: the last two tokens have fewer ahead
    assert result["trained"] == [True] * (len(response) - 2) + [False] * 2
    assert result["mean"] == pytest.approx(sum(result["spread"][:-2]) / (len(response) - 2))
    assert result["together"] == pytest.approx(spread_together(samples[:-2]).item(), rel=1e-4)

    page = (out / "futures.html").read_text()
    assert page.count("<span ") == len(response) + 3 and page.count("<span class=short style") == 2
    read = html.unescape(re.sub("<[^>]*>", "", page.partition('<p class="text">')[2]))
    assert read.strip() == before + TEXT + "<|im_end|>"
    fullest = result["spread"].index(max(result["spread"]))
    assert f'rgb(238, 119, 51)" title="{result["spread"][fullest]:.3f}"' in page
    assert (out / "futures.png").read_bytes().startswith(b"\x89PNG")
    assert shown.startswith(f"{TEXT}<|im_end|>\n\nMost open:\n  ") and "\x1b" not in shown
    listed = [line.split()[0] for line in shown.splitlines()[3:8]]
    said_by = [value for value, token in zip(result["spread"][:-2], result["tokens"], strict=False) if token]
    assert listed == [f"{value:.3f}" for value in sorted(said_by, reverse=True)[:5]]

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(["futures", str(folder / "run"), "--file", str(tmp_path / "text.txt"), "--out", str(out)]) == 0
    assert "48;2;238;119;51m" in capsys.readouterr().out
    alone = json.loads((out / "futures.json").read_text())
    assert alone["context"] == "One" and alone["tokens"][0] == " <" and len(alone["spread"]) == len(response) - 2


def test_differences_of_nothing_stay_pale_and_what_was_not_trained_is_not_listed(capsys):
    flat = Measured("", ["a", " b"], [0.9, 0.901], [True, False], 0.9, 0.9)
    assert flat.scale() == pytest.approx((0.9, 0.95)) and flat.colours() == [(255, 255, 255), (255, 252, 251)]
    _show(flat)
    assert "[a]" in (shown := capsys.readouterr().out) and "[b]" not in shown


def test_a_token_keeps_a_space_that_its_tokenizer_drops_at_the_beginning():
    words = SimpleNamespace(decode=lambda ids: " ".join("abcd"[i] for i in ids))
    assert _pieces(words, [0, 1, 2, 3], [1, 2, 3]) == [" b", " c", " d"]


def test_bad_input_is_an_error_before_anything_is_written(folder, tmp_path, capsys):
    run, out = str(folder / "run"), tmp_path / "out"
    for name, config in {
        "mse": SFRConfig(loss="mse", width=8),
        "cka": SFRConfig(loss="cka", segment="response"),
        "still": SFRConfig(source_std=0.0, width=8),
    }.items():
        (tmp_path / name).mkdir()
        save_head(tmp_path / name, random_loss(config))
    shutil.copytree(folder / "run" / "model", tmp_path / "other")
    save_head(tmp_path / "other", random_loss(hidden_size=HIDDEN + 1))
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for model, extra, message in (
        (str(tmp_path / "absent"), ["--text", "Yes."], "there is no velocity head"),
        (str(tmp_path / "mse"), ["--text", "Yes."], "loss='mse', which has one future"),
        (str(tmp_path / "cka"), ["--text", "Yes."], "loss='cka', which has one future"),
        (str(tmp_path / "still"), ["--text", "Yes."], "source_std=0"),
        (str(tmp_path / "other"), ["--text", "Yes or no."], "the head is for hidden size 33, the model's is 32"),
        (run, ["--text", " \n"], "the text is empty"),
        (run, ["--text", "Yes"], "the text has one token"),
        (run, ["--text", "yes " * 300], "beyond the model's context of 256"),
        (run, ["--text", "Yes.", "--prompt", "Why? " * 200], "beyond the model's context of 256"),
        (run, ["--text", "Yes.", "--system", "Be terse."], "--system needs --prompt"),
        (run, ["--text", "Yes.", "--noises", "1"], "--noises must be at least 2, got 1"),
        (run, ["--text", "Yes.", "--steps", "0"], "--steps must be at least 1, got 0"),
        (run, ["--file", str(tmp_path / "none")], "none"),
        (run, ["--file", str(tmp_path / "latin")], "latin: not UTF-8"),
    ):
        assert main(["futures", model, *extra, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err and not out.exists(), message
