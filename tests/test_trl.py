"""SFRTrainer: what TRL prepares, trained on the SFR objective as one process trains the whole batch by hand."""

import contextlib
import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("trl")

from corpora import HashEncoder
from datasets import Dataset
from outcomes import assert_same, trained, weights
from peft import PrefixTuningConfig, PromptTuningConfig
from tiny import CONFIG, SAMPLES, SIZES, STORE, TARGET, adapted, attached, lora, pad, tiny_llama, tiny_mixtral
from transformers import AutoModelForCausalLM, pipeline
from trl import DPOConfig, DPOTrainer, SFTTrainer
from trl_cases import ENCODER, ByHand, chunked_loss, expected_loss, in_parts, make_trainer, settings, texts, tokenizer

from sfr_kernels import LinearCrossEntropy, SFRConfig, SFRLoss, VelocityHead, attach, detach
from sfr_kernels.ops.flow_loss import step_seed
from sfr_kernels.targets import OnlineTargets, SFRCollator
from sfr_kernels.training.objectives import attachment_of
from sfr_kernels.training.trl import SFRTrainer

setting = pytest.mark.setting


def ours() -> dict:
    """SFRTrainer wraps the model with PEFT."""
    return dict(peft_config=lora(init_lora_weights="gaussian"))


STREAM = texts("plain").to_iterable_dataset()
ONLINE = OnlineTargets(ENCODER, tokenizer())
BFD = dict(packing=True, max_length=32)
VIRTUAL = dict(task_type="CAUSAL_LM", num_virtual_tokens=4)
# Data, arguments, what else is given; rows of the training README's table beside that of the mode's own name.
MODES = {
    "plain": ("plain", {}, {}, ["padding on the right"]),
    "own collator": ("plain", {}, ours() | dict(data_collator=pad), ["peft_config"]),
    "assistant only": ("chat", dict(assistant_only_loss=True, max_length=128), ours(), ["peft_config"]),
    "completion only": ("completion", dict(label_smoothing_factor=0.1), {},
                        ["label smoothing, with SFRCallback().add_to", "LoRA before attach"]),
    "packing bfd": ("plain", BFD, {}, ["packing"]),
    "packing bfd_split": ("completion", dict(packing=True, max_length=20, packing_strategy="bfd_split"), ours(), []),
    "packing wrapped": ("plain", dict(packing=True, max_length=16, packing_strategy="wrapped"), {}, []),
    "padding-free": ("chat", dict(padding_free=True, max_length=None, assistant_only_loss=True), {}, []),
}  # fmt: skip
ADAPTED_BEFORE = ("completion only", "padding-free")
CASES = [
    pytest.param(mode, marks=[setting("SFRTrainer", name) for name in (mode, *shown)[mode == "plain" :]])
    for mode, (*_, shown) in MODES.items()
]


@setting("SFRTrainer", "gradient accumulation")
@pytest.mark.parametrize("mode", CASES)
@pytest.mark.filterwarnings("error:.*label_smoothing_factor:FutureWarning")  # of a forward pass that is none here
@pytest.mark.filterwarnings("ignore:no label is supervised:RuntimeWarning")  # of a pack of prompts alone
def test_training_ends_where_one_process_with_the_whole_batch_does(tmp_path, mode):
    """In float32, whatever is accumulated: within 2e-4 of how far each parameter moved."""
    kind, arguments, given, _ = MODES[mode]
    data = texts(kind, 40 if arguments.get("packing") else 12)
    by_hand = ByHand(label_smoothing=arguments.get("label_smoothing_factor", 0.0))
    for model, parts in in_parts(adapters=mode in ADAPTED_BEFORE):
        objective = dict(sfr=chunked_loss(), encoder=ENCODER, targets=tmp_path / "targets")
        trainer = make_trainer(tmp_path, model=model, train=data, arguments=arguments | parts, **objective, **given)
        by_hand.check(trainer, trainer.train_dataset.to_list())


@setting("SFRTrainer", "token accuracy and entropy in the logs")
@setting("SFRTrainer", "prefix tuning")
@pytest.mark.parametrize("way", ["completion", "packing", "prefix tuning"])
def test_cross_entropy_and_metrics_are_those_of_sfttrainer(tmp_path, way):
    """At the first step, and in evaluation before it: of the same weights."""
    kind, runs = "completion" if way == "completion" else "plain", []
    arguments = dict(max_steps=1, eval_strategy="steps", eval_on_start=True, gradient_checkpointing=False)
    arguments |= BFD if way == "packing" else {}
    prefix = dict(peft_config=PrefixTuningConfig(**VIRTUAL)) if way == "prefix tuning" else {}
    for kind_of, loss in ((SFRTrainer, "ce_loss"), (SFTTrainer, "loss")):
        given = dict(model=tiny_llama(initializer_range=0.2), eval_dataset=texts(kind, 5, seed=1)) | prefix
        trainer = trained(make_trainer(tmp_path, kind, kind_of=kind_of, arguments=arguments, **given))
        names = (loss, "entropy", "mean_token_accuracy", "num_tokens")
        evaluated, logged = trainer.state.log_history[:2]
        runs.append([logged[n] for n in names] + [evaluated[f"eval_{n}"] for n in names])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5) and runs[0][3] > 0


@setting("SFRTrainer", "evaluation")
def test_evaluation_sets_have_targets_of_their_own(tmp_path):
    sets = {"a/b": texts("plain", 3, seed=1), "c": texts("plain", 6, seed=2)}
    trainer = make_trainer(tmp_path, eval_dataset=sets, arguments=dict(per_device_eval_batch_size=8))
    assert sorted(p.name for p in (tmp_path / "targets").iterdir()) == ["eval-a%2Fb", "eval-c", "train"]
    trainer.predict(trainer.eval_dataset["c"])  # whose metrics are no other set's
    found, model = trainer.evaluate(), copy.deepcopy(trainer.model)
    assert trainer.state.log_history[0]["eval_entropy"] == trainer.evaluate("a/b")["eval_entropy"]
    head = detach(model)
    for name, start in (("a/b", 12), ("c", 15)):  # counted on from the training data
        samples = list(enumerate(trainer.eval_dataset[name].to_list(), start))
        with torch.no_grad():
            wanted = expected_loss(model, head, samples, step_seed(CONFIG.seed, -1)).loss.item()
        assert found[f"eval_{name}_loss"] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match=r"has no targets: .* constructor.*trainer\.eval_dataset, as prepared.*Online"):
        trainer.evaluate(sets["c"])
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0


def test_targets_are_built_once_and_opened_without_an_encoder(tmp_path):
    encoder = HashEncoder()
    make_trainer(tmp_path, encoder=encoder)
    encoded = len(encoder.texts)
    make_trainer(tmp_path, encoder=encoder)
    assert encoded == len(encoder.texts) > 0
    make_trainer(tmp_path, encoder=None).train()
    for given in (None, encoder):
        with pytest.raises(ValueError, match=r"made differently: data.*packed differently") as caught:
            make_trainer(tmp_path, encoder=given, arguments=BFD)
        what_to_do = f". Give another folder in targets=, or remove {tmp_path / 'targets' / 'train'}"
        assert str(caught.value).endswith(what_to_do) and "build_targets" not in str(caught.value)
    (tmp_path / "targets" / "train" / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"damaged.*another folder in targets="):
        make_trainer(tmp_path)


def test_ids_that_the_data_happen_to_have_are_not_those_of_targets_built_here(tmp_path):
    tokenized = make_trainer(tmp_path / "plain").train_dataset.select_columns("input_ids")
    for name, data in (("texts", texts("plain")), ("tokenized", tokenized)):
        data = data.add_column("sample_id", list(range(12))[::-1])
        trainer = make_trainer(tmp_path / name, train=data, eval_dataset=data.select(range(3)))
        assert trainer.train_dataset["sample_id"][:] == list(range(12))
        assert trainer.eval_dataset["sample_id"][:] == [12, 13, 14]
        trainer.train()
    with pytest.raises(ValueError, match="data set to evaluate has no targets"):
        trainer.evaluate(texts("plain").add_column("sample_id", ["a"] * 12))


@setting("SFRTrainer", "streaming data set")
@setting("SFRTrainer", "OnlineTargets")
def test_a_stream_trains_on_online_targets_as_the_store_does(tmp_path):
    online = trained(make_trainer(tmp_path, train=STREAM, sfr=CONFIG, targets=ONLINE))
    assert_same(online.model, trained(make_trainer(tmp_path)).model)
    assert online.evaluate(texts("plain", 3))["eval_loss"] > 0


@setting("SFRTrainer", "cross-entropy alone")
@setting("SFRTrainer", "router loss of a mixture of experts")
@pytest.mark.parametrize(
    "make, arguments", [(tiny_mixtral, dict(router_aux_loss_coef=0.5)), (tiny_llama, dict(label_smoothing_factor=0.2))]
)
def test_cross_entropy_alone_trains_as_sfttrainer_does(tmp_path, make, arguments):
    """A router loss has the coefficient of TRL's arguments, and each accumulated batch its share."""
    arguments = arguments | dict(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    runs = []
    for kind_of, given in ((SFTTrainer, {}), (SFRTrainer, dict(objective="ce"))):
        given |= dict(model=make(), kind_of=kind_of, arguments=arguments)
        warned = kind_of is SFTTrainer and make is tiny_llama
        with pytest.warns(FutureWarning, match="label_smoothing_factor") if warned else contextlib.nullcontext():
            runs.append(make_trainer(tmp_path, "completion", **given))
        trained(runs[-1])
    assert_same(runs[1].model, runs[0].model, rtol=1e-4, atol=1e-6)
    plain, logged = (trainer.state.log_history[0] for trainer in runs)
    assert set(logged) == set(plain) and ("aux_loss" in plain) == (make is tiny_mixtral)
    for name in set(plain) - {"learning_rate", "epoch", "step", "grad_norm"}:
        assert logged[name] == pytest.approx(plain[name], rel=1e-5), name


def test_an_attached_model_keeps_its_objective_and_goes_under_peft(tmp_path):
    head = VelocityHead.from_config(CONFIG, SIZES["hidden_size"], TARGET)
    model = attach(tiny_llama(), SFRLoss(CONFIG, head, z_loss=0.1), ONLINE)
    for name, value in (("sfr", CONFIG), ("targets", tmp_path), ("encoder", ENCODER)):
        with pytest.raises(ValueError, match=f"{name} must not be given: the model is attached"):
            make_trainer(tmp_path, model=model, **dict(targets=None) | {name: value})
    with pytest.raises(ValueError, match="attached with the SFR objective"):
        make_trainer(tmp_path, model=model, objective="ce")
    with pytest.raises(ValueError, match="objective must not be 'mtp': the model is attached with another"):
        make_trainer(tmp_path, model=model, objective="mtp")
    with pytest.raises(ValueError, match="max_length"):  # from TRL's constructor, when it had been detached
        make_trainer(tmp_path, model=model, targets=None, arguments=dict(padding_free=True))
    assert attachment_of(model).head is head
    trainer = make_trainer(tmp_path, model=model, targets=None, **ours())
    sfr = attachment_of(trainer.model)
    assert sfr.head is head and sfr.options["z_loss"] == 0.1 and isinstance(sfr.store, OnlineTargets)
    trainer.train()
    assert trainer.state.log_history[0]["flow_loss"] > 0 and head.output_proj.weight.abs().max() > 0
    detach(trainer.model)
    assert "forward" not in trainer.model.get_base_model().__dict__  # nor is TRL's there
    alone = attach(tiny_llama(), LinearCrossEntropy(z_loss=0.1), objective="ce")
    trainer = make_trainer(tmp_path, model=alone, targets=None)
    assert attachment_of(trainer.model).options["z_loss"] == 0.1
    # the collator that goes with an attached model is taken apart
    model = attach(tiny_llama(), CONFIG, target_size=TARGET)
    collator = SFRCollator(CONFIG, ONLINE, pad)
    trainer = make_trainer(tmp_path, model=model, targets=tmp_path / "own", encoder=ENCODER, data_collator=collator)
    assert trainer.data_collator.collator is pad and len(trainer.data_collator.targets) == 12


def test_a_store_of_ones_own_goes_by_the_samples_ids(tmp_path):
    given = dict(train=Dataset.from_list(SAMPLES[::-1]), sfr=CONFIG, targets=STORE, arguments=dict(max_steps=1))
    assert trained(make_trainer(tmp_path, **given)).train_dataset["sample_id"][0] == 7
    make_trainer(tmp_path, **given | dict(train=Dataset.from_list(SAMPLES).remove_columns("sample_id"))).train()
    with pytest.raises(ValueError, match="hold 8 samples, the prepared data 1, without a 'sample_id'"):
        make_trainer(tmp_path, **given | dict(arguments=dict(packing=True, max_length=1024)))


REFUSED = {
    "loss_type='dft'": dict(arguments=dict(loss_type="dft")),
    "compute_loss_func would replace the SFR loss": dict(compute_loss_func=lambda *args, **kwargs: 0),
    "train_dataset has images": dict(train=Dataset.from_list([{"text": "a cat", "image": "x.png"}])),
    "OnlineTargets for an IterableDataset .train": dict(train=STREAM),
    "OnlineTargets for an IterableDataset .eval": dict(eval_dataset=STREAM),
    "encoder must be given: there are no targets in .*train yet": dict(encoder=None),
    "encoder has no meaning with objective='ce'": dict(objective="ce", encoder=ENCODER),
    "targets has no meaning with loss='mtp'": dict(sfr=SFRConfig(loss="mtp"), targets="t"),
    "encoder has no meaning with objective='mtp'": dict(objective="mtp", encoder=ENCODER),
    "sfr must be SFRConfig or VelocityHead or SFRLoss with objective": dict(sfr=LinearCrossEntropy(), targets="t"),
    "sfr must be LinearCrossEntropy or None with objective='ce', got SFRConfig": dict(objective="ce", sfr=CONFIG),
    "objective must be sfr or mtp or ce": dict(objective="dpo"),
    "encoder must not be given with Online": dict(sfr=CONFIG, targets=ONLINE, encoder=ENCODER),
    "targets must be a folder, OnlineTargets or a TargetStore, got int": dict(sfr=CONFIG, targets=3),
    "peft_config must not put .*num_virtual_tokens=4": dict(peft_config=PromptTuningConfig(**VIRTUAL)),
}


@setting("SFRTrainer", "compute_loss_func", outcome="refused")
@setting("SFRTrainer", 'loss_type="dft"', outcome="refused")
@setting("SFRTrainer", "images", outcome="refused")
@setting("SFRTrainer", "prompt tuning", outcome="refused")
@setting("SFRTrainer", "streaming data set without OnlineTargets", outcome="refused")
@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_trained_is_refused_in_words_that_help(tmp_path, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_trainer(tmp_path, **REFUSED[message])


@setting("SFRTrainer", "adapters after attach", outcome="refused")
def test_adapters_after_attach_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="Wrap the model first, then attach"):
        make_trainer(tmp_path, model=adapted(attached(ONLINE)), targets=None).train()


@setting("Trainer", "TRL's SFTTrainer and DPOTrainer", outcome="refused")
@setting("Trainer", "a loss of the trainer's own (as DPO's)", outcome="refused")
@pytest.mark.parametrize("when", ["before", "after"])
def test_trainers_of_trl_that_multiply_by_the_lm_head_themselves_stop_at_the_first_step(tmp_path, when):
    preferences = Dataset.from_list([{"prompt": "t h", "chosen": " e c", "rejected": " a t"}] * 4)
    dpo = DPOConfig(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True)
    for kind_of, arguments, train, given in (
        (SFTTrainer, settings(tmp_path), texts("plain"), {}),
        (DPOTrainer, dpo, preferences, dict(ref_model=tiny_llama())),
    ):
        model = tiny_llama()
        if when == "before":
            attach(model, CONFIG, target_size=TARGET)
        trainer = kind_of(model, args=arguments, train_dataset=train, processing_class=tokenizer(), **given)
        if when == "after":
            attach(trainer.model, CONFIG, target_size=TARGET)
        before = weights(model)
        with pytest.raises(RuntimeError, match=r"does not compute the loss that was attached.*trl.SFRTrainer"):
            trainer.train()
        assert_same(model, before)


@setting("own loop", "pipelines")
def test_a_pipeline_generates_as_with_the_plain_model():
    said = []
    for model in (tiny_llama(), attached(ONLINE)):
        run = pipeline("text-generation", model=model.eval(), tokenizer=tokenizer())
        said.append(run("t h e c a t", max_new_tokens=5, do_sample=False)[0]["generated_text"])
    assert said[0] == said[1] != "t h e c a t"


@setting("SFRTrainer", "SFRConfig(loss=…) other than flow")
@pytest.mark.parametrize(
    "given", [dict(sfr=SFRConfig(loss="mtp", width=8)), dict(sfr=SFRConfig(mtp_tokens=2, width=8), objective="mtp")]
)
def test_multi_token_prediction_has_no_targets_and_no_encoder(tmp_path, given):
    trainer = trained(make_trainer(tmp_path, encoder=None, targets=None, **given))
    config = given["sfr"]
    assert attachment_of(trainer.model).config == replace(config, loss="mtp")
    assert attachment_of(trainer.model).head.shape.output_size == config.mtp_tokens * SIZES["hidden_size"]
    assert trainer.state.log_history[0]["flow_loss"] > 0 and trainer.evaluate(texts("plain", 2))["eval_loss"] > 0


@setting("SFRTrainer", "resuming")
@setting("SFRTrainer", "save_pretrained")
def test_saved_generated_and_resumed(tmp_path):
    whole = trained(make_trainer(tmp_path, arguments=dict(save_strategy="steps", save_steps=1)))
    prompt = torch.tensor([[7, 8, 9]])
    spoken = whole.model.eval().generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    whole.save_model(tmp_path / "saved")
    assert {"sfr_head.safetensors", "sfr_config.json"} < {p.name for p in (tmp_path / "saved").iterdir()}
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(plain.generate(input_ids=prompt, max_new_tokens=4, do_sample=False), spoken)
    resumed = make_trainer(tmp_path / "elsewhere")  # whose head lies in the folder that is resumed
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(resumed.model, whole.model)


@setting("SFRTrainer", "compute_metrics")
def test_compute_metrics_sees_the_logits(tmp_path):
    seen = []
    given = dict(eval_dataset=texts("plain", 2, seed=1), compute_metrics=lambda p: seen.append(p) or {"count": 1.0})
    trainer = make_trainer(tmp_path, **given)
    assert trainer.evaluate()["eval_count"] == 1.0
    batch = trainer.data_collator.collator(trainer.eval_dataset.to_list())
    with torch.no_grad():
        wanted = trainer.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.as_tensor(seen[0].predictions), wanted)
    assert torch.equal(torch.as_tensor(seen[0].label_ids), batch["labels"])


def test_trl_is_needed_by_its_own_module_alone():
    script = (
        "import sys, sfr_kernels.training.attach, sfr_kernels.training.callbacks\n"
        "assert 'trl' not in sys.modules\n"
        "sys.modules['trl'] = None\n"
        "try:\n    import sfr_kernels.training.trl\nexcept ImportError as error:\n    print(error)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "pip install 'sfr_kernels[trl]'" in told


def test_targets_are_made_of_the_labels_that_the_collator_gives(tmp_path):
    """Which takes the first label of each document away, a row's own under the rule "published", where it does not pad;
    and labels what has no labels throughout."""
    samples = texts("plain").map(tokenizer(), input_columns="text").select_columns("input_ids")
    bare = dict(dataset_kwargs=dict(skip_prepare_dataset=True))
    published = replace(CONFIG, target_rule="published")
    free, packed = bare | dict(padding_free=True, max_length=None), dict(packing=True, max_length=64)
    for i, (config, arguments) in enumerate([(CONFIG, bare), *((published, x) for x in (bare, free, packed))]):
        trainer = make_trainer(tmp_path / str(i), train=samples, sfr=config, arguments=arguments | dict(max_steps=1))
        trainer.train()  # the collator compares the labels
        assert trainer.state.log_history[0]["flow_loss"] > 0
