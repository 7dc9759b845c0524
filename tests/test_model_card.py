"""What is pushed to the hub, which is patched: the plain model, the head, and a card that says how it was trained."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import trl_cases
import yaml
from corpora import HashEncoder, Words, build
from huggingface_hub import ModelCard
from outcomes import assert_same, trained
from safetensors.torch import load_file
from test_saving import RECIPE, SAMPLES, STEPS, STORE, make_trainer
from tiny import CONFIG, adapted, attached, ce_attached, tiny_llama
from transformers import AutoModelForCausalLM

from sfr_kernels import SFRConfig, __version__, attach, detach
from sfr_kernels.targets import OnlineTargets
from sfr_kernels.training.checkpoint import load_head
from sfr_kernels.training.head import fit_head
from sfr_kernels.training.objectives import attachment_of

pytestmark = pytest.mark.usefixtures("one_thread")
setting = pytest.mark.setting
HEAD = {"sfr_head.safetensors", "sfr_config.json"}
MINE = "---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n\nA word.\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What was pushed, as folders."""
    pushed: list[Path] = []

    def into(api, folder_path, *, ignore_patterns=(), path_in_repo="", **options):
        found = tmp_path / "hub" / str(len(pushed)) / path_in_repo
        shutil.copytree(folder_path, found, ignore=shutil.ignore_patterns(*ignore_patterns))
        pushed.append(found)
        return SimpleNamespace(done=lambda: True)

    def commit(api, repo_id, operations, **options):
        found = tmp_path / "hub" / str(len(pushed))
        found.mkdir(parents=True)
        for file in operations:
            shutil.copy(file.path_or_fileobj, found / file.path_in_repo)
        pushed.append(found)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda api, name, **o: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", into)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    return pushed


def section(folder: Path) -> str:
    """What a card says about the training, once."""
    [found] = re.findall("<!-- sfr_kernels -->\n(.*?)\n<!-- /sfr_kernels -->", (folder / "README.md").read_text(), re.S)
    return found


def tags(folder: Path) -> list[str]:
    """By a reader of YAML alone."""
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])["tags"]


def assert_pushed(folder: Path, model, *wanted: str) -> None:
    """The weights of the model, with nothing of the head among them, the head, and the card."""
    assert set(wanted) | {"sfr"} <= set(tags(folder))
    assert "arxiv.org/abs/2605.27971" in section(folder)
    assert_same(load_head(folder).head, attachment_of(model).head)
    plain = folder / "model.safetensors"
    if plain.exists():
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert_same(loaded, {n: p.detach() for n, p in model.named_parameters() if not n.startswith("sfr.")})
    else:
        saved = load_file(folder / "adapter_model.safetensors")
        lora = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if "lora_" in n}
        assert_same(saved, lora)


def plain_model(kind: str):
    return adapted(tiny_llama()) if kind == "lora" else tiny_llama()


def model_of(kind: str):
    return attach(plain_model(kind), CONFIG, STORE)


with_adapters = pytest.mark.parametrize("kind", ["full", "lora"])


@setting("own loop", "push_to_hub")
@with_adapters
def test_a_model_is_pushed_with_its_head_and_card(tmp_path, hub, kind):
    model = model_of(kind)
    model.push_to_hub("me/mine", tags=["mine"])
    assert_pushed(hub[0], model, *(["mine"] if kind == "full" else []))
    detach(model)
    model.push_to_hub("me/mine")
    assert not HEAD & {p.name for p in hub[1].iterdir()} and "sfr_kernels" not in (hub[1] / "README.md").read_text()


@setting("own loop", "save_pretrained(push_to_hub=True)")
def test_what_save_pretrained_pushes_is_what_it_saves(tmp_path, hub):
    """Where the folder had an older save of it, too, whose files are older than the push."""
    model = model_of("full")
    for _ in range(2):
        torch.nn.init.normal_(model.sfr.head.output_proj.weight)
        model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine")
        assert_pushed(hub[-1], model)
        assert_same(load_head(tmp_path / "mine").head, model.sfr.head)


@setting("Trainer", "push_to_hub")
@with_adapters
def test_a_trainer_pushes_each_checkpoint_and_the_end_whole(tmp_path, hub, kind):
    """ "last-checkpoint" has what a run goes on from."""
    given = dict(push_to_hub=True, hub_model_id="me/mine", hub_strategy="checkpoint", save_steps=4, max_steps=5)
    trainer = trained(make_trainer(tmp_path / "out", model=plain_model(kind), save_total_limit=1, **given))
    trainer.push_to_hub(tags=["mine"])
    assert len(hub) == 5 and [f.name for f in hub] == ["0", "last-checkpoint", "2", "last-checkpoint", "4"]
    assert_pushed(hub[4], trainer.model, "lora" if kind == "lora" else "mine")  # PEFT keeps no others
    assert "optimizer steps: 5" in section(hub[4])
    for folder in hub[:2]:
        assert "optimizer steps: 4" in section(folder) and "sfr" in tags(folder)
        assert_same(load_head(folder).head, load_head(hub[1]).head)
    whole = trained(make_trainer(tmp_path / "whole", max_steps=5, save_strategy="no", model=plain_model(kind)))
    resumed = make_trainer(tmp_path / "again", max_steps=5, model=plain_model(kind))
    assert_same(trained(resumed, resume_from_checkpoint=str(hub[1])).model, whole.model)
    assert resumed.state.log_history[0]["loss"] == whole.state.log_history[0]["loss"]


# ---------------------------------------------------------------------------------------------------------------------
# The card


@setting("own loop", "a model card that is there already")
def test_a_card_gets_one_section_and_keeps_the_rest(tmp_path):
    model = attached(STORE)
    card = tmp_path / "README.md"
    card.write_text(MINE)
    for step in (3, 4):
        model.sfr.step = step
        model.save_pretrained(tmp_path)
        assert f"optimizer steps: {step}\n" in section(tmp_path)
        card.write_text(card.read_text() + "After.\n")  # as PEFT adds lines at the end
    head, body = re.split("<!-- sfr_kernels -->.*<!-- /sfr_kernels -->\n", card.read_text(), flags=re.DOTALL)
    assert head == MINE.replace("- mine\n", "- mine\n- sfr\n") + "\n" and body == "After.\nAfter.\n"
    card.write_text("---\ntags: mine\n---\nText.\n")  # a word in place of a list
    model.save_pretrained(tmp_path)
    assert ModelCard.load(card).data.tags == ["mine", "sfr"]
    detach(model)
    card.unlink()
    model.save_pretrained(tmp_path)
    assert not card.exists()


@setting("Trainer", "create_model_card")
@setting("SFRTrainer", "create_model_card")
@pytest.mark.parametrize("kind", ["Trainer", "SFRTrainer", "PEFT"])
def test_the_section_outlasts_a_card_that_is_written_anew(tmp_path, kind):
    if kind == "SFRTrainer":
        trainer = trl_cases.make_trainer(tmp_path)
        wanted = {"trl", "sft", "sfr"}
    else:
        trainer = make_trainer(tmp_path, model=plain_model("lora" if kind == "PEFT" else "full"))
        wanted = {"generated_from_trainer", "sfr"}
    for _ in range(2):
        if kind == "PEFT":
            trainer.model.create_or_update_model_card(str(tmp_path))
            wanted = {"base_model:adapter:", "lora", "sfr", "transformers"}
            assert "- PEFT" in (tmp_path / "README.md").read_text().split("<!-- sfr_kernels -->")[0]
        else:
            trainer.create_model_card(tags=["mine"])
            wanted |= {"mine"}
        assert "optimizer steps: 0" in section(tmp_path) and wanted <= set(tags(tmp_path))


def saved_section(model, folder: Path) -> str:
    model.save_pretrained(folder)
    return section(folder)


def test_the_section_says_how_the_model_was_trained(tmp_path):
    trainer = trained(make_trainer(tmp_path / "auto", save_strategy="no"))
    sfr = trainer.model.sfr
    found = saved_section(trainer.model, tmp_path / "a")
    assert f"{sfr.flow_weight:.4g} was reached" in found and f"optimizer steps: {STEPS}" in found
    assert "fit the velocity head to the model: 3 steps" in found and "embeddings of 12 numbers\n" in found
    given = re.search(r"`(SFRConfig.*?)`", found).group(1)
    assert eval(given) == RECIPE and "num_layers" not in given
    versions = (f"sfr_kernels {__version__}", f"PyTorch {torch.__version__.split('+')[0]}.")
    assert all(v in found for v in versions) and str(tmp_path) not in (tmp_path / "a" / "README.md").read_text()
    resumed = make_trainer(tmp_path / "b", save_strategy="no")
    plain = attach(tiny_llama(), SFRConfig(), target_size=12)
    found = saved_section(plain, tmp_path / "c")
    assert "λ: 1\n" in found and "`SFRConfig()`, the default" in found and "targets:" not in found
    assert "fit the velocity head" not in found and resumed.model.sfr.fitted is None  # not known
    batches = [resumed.data_collator(SAMPLES[:4])]
    fit_head(resumed.model, batches, 2, progress=False)
    found = saved_section(resumed.model, tmp_path / "d")
    assert "the model: 2 steps" in found and "1, as no share was measured" in found


def test_the_section_names_the_encoder_and_no_folder_of_the_machine(tmp_path):
    encoder = HashEncoder()
    for name, said in ((str(tmp_path / "encoders" / "mine"), "`mine`"), ("org/small", "`org/small`")):
        encoder.sfr_name = name
        stores = (build(tmp_path / name.replace("/", "-"), SAMPLES, encoder=encoder), OnlineTargets(encoder, Words()))
        for i, store in enumerate(stores):
            found = saved_section(attach(tiny_llama(), CONFIG, store), tmp_path / f"{i}{said}")
            assert f"embeddings of 12 numbers by the sentence encoder {said}\n" in found
            assert str(tmp_path) not in found


def test_other_objectives_are_said_and_not_taken_for_sfr(tmp_path):
    mtp = attach(tiny_llama(), SFRConfig(mtp_tokens=2), objective="mtp")
    found = saved_section(mtp, tmp_path / "mtp")
    assert "multi-token prediction" in found and "mtp_tokens=2" in found and tags(tmp_path / "mtp") == ["mtp"]
    found = saved_section(ce_attached(), tmp_path / "ce")
    assert "Cross-entropy alone" in found and "2605.27971" not in found and "SFRConfig" not in found
    assert not [p for p in (tmp_path / "ce").iterdir() if p.name.startswith("sfr_")]
    said = {"mse": "regression limit", "cosine": "cosine", "cka": "CKA"}
    for loss, words in said.items():
        segment = "response" if loss == "cka" else "tokens"
        model = attach(tiny_llama(), SFRConfig(loss=loss, segment=segment), target_size=12)
        found = saved_section(model, tmp_path / loss)
        assert words in found and ("sfr_head" in found) == (loss != "cka") and tags(tmp_path / loss) == ["sfr"]


@pytest.mark.parametrize("text", [b"---\n- a list\n---\n", b"---\na: [\n---\n", b"\xff\xfe"])
def test_a_card_that_cannot_be_read_is_left_alone(tmp_path, text):
    card = tmp_path / "README.md"
    card.write_bytes(text)
    with pytest.warns(UserWarning, match=r"README.md does not say how the model was trained"):
        attached(STORE).save_pretrained(tmp_path)
    assert card.read_bytes() == text and load_head(tmp_path).head is not None
    attached(STORE).save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "README.md").exists()


def test_the_base_model_is_named_where_it_is_one_of_the_hub(tmp_path):
    for name, said in (("org/base", "org/base"), (str(tmp_path), None), ("", None)):
        model = attached(STORE)
        model.config._name_or_path = name
        folder = tmp_path / f"saved {said}"
        model.save_pretrained(folder)
        assert ModelCard.load(folder / "README.md").data.base_model == said
        shutil.rmtree(folder)
