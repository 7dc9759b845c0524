"""`SFRTrainer`: TRL's SFTTrainer, trained on the SFR objective.

SFTTrainer computes its loss itself, from the trunk's output and the lm_head's weight, and never calls the forward in
which an attached model computes its own. Here its constructor loads the model, wraps it with PEFT, and prepares the
data; then their targets are built, the model is attached, and the loss is the model's, as in `transformers.Trainer`.
"""

import inspect
import os
import warnings
from unittest.mock import patch

import torch
from peft import PeftType
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..config import SFRConfig
from ..modules import LinearCrossEntropy, SFRLoss, VelocityHead
from ..targets import OnlineTargets, SFRCollator, TargetStore, load_encoder
from .attach import attach, base_of, detach
from .callbacks import SFRCallback
from .objectives import Attachment, attachment_of, objective_of

try:
    from trl import SFTTrainer
    from trl.trainer import sft_trainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
except ImportError as error:
    raise ImportError(f"SFRTrainer needs trl ({error}): pip install 'sfr_kernels[trl]'") from error

from .prepared import check_folder, find_targets, has_ids, named_sets, number, number_all

FOLDER = "targets"
_METRICS = "SFRTrainer"  # their name among the `stateful_callbacks` of trainer_state.json


class SFRTrainer(SFTTrainer):
    """SFTTrainer with the SFR objective: its arguments, and those below (README.md has an example).

    The targets of the prepared data are built in a folder, or opened if they are there. OnlineTargets are for an
    IterableDataset. Objectives "ce" and "mtp" take no encoder and no targets. A model that is attached already has
    its objective and its targets: neither is given again. `ce_loss`, `flow_loss` and `flow_weight` are logged beside
    what SFTTrainer logs. ValueError, before training, for what would replace the loss (loss_type="dft",
    compute_loss_func) and for data without targets.
    """

    def __init__(
        self,
        *args,
        sfr: SFRConfig | VelocityHead | SFRLoss | LinearCrossEntropy | None = None,  # as in `attach`; None: SFRConfig()
        encoder=None,  # SentenceTransformer, or its name or path
        targets: str | os.PathLike | OnlineTargets | TargetStore | None = None,  # None: the folder "targets"
        objective: str = "sfr",  # or "mtp": multi-token prediction; or "ce": fused cross-entropy alone
        **kwargs,
    ):
        given = inspect.signature(SFTTrainer.__init__).bind(self, *args, **kwargs).arguments
        del given["self"]
        _refuse_what_has_no_sfr_loss(given)
        model = given["model"]
        attached = attachment_of(model) if isinstance(model, nn.Module) else None
        if attached is not None:
            sfr, targets, objective = _taken_over(attached, sfr, encoder, targets, objective)
        elif sfr is None and objective == "sfr":
            sfr = SFRConfig()
        sfr = objective_of("sfr", sfr, objective)  # attach would, but only after the data are prepared
        targets = _check_targets(sfr, targets, encoder, objective)
        if isinstance(targets, str | os.PathLike):
            check_folder(targets, encoder, named_sets(given.get("train_dataset"), given.get("eval_dataset")))
        self._keeps_ids = isinstance(targets, TargetStore)  # its samples are found by the sample_id of the data
        if isinstance(encoder, str):
            encoder = load_encoder(encoder)
        if isinstance(given.get("data_collator"), SFRCollator):
            given["data_collator"] = given["data_collator"].collator
        if attached is not None:
            detach(model)  # PEFT wraps a plain model
        try:
            self._prepare(given)
            self._attach(sfr, encoder, targets, objective)
        except BaseException:
            if attached is not None and attachment_of(model) is None:
                attach(model, sfr, targets=attached.store, objective=objective)
            raise
        self._batch_metrics: dict[str, list[Tensor]] = {"train": [], "eval": []}  # of every batch since the last log
        self._tokens: Tensor | int = 0  # trained on so far

    def _prepare(self, given: dict) -> None:
        """SFTTrainer's constructor, without its change of the model's forward."""
        own = _OwnForward()
        # It refuses adapters of the lm_head, which the loss here computes. `isinstance` of an empty tuple is false.
        with warnings.catch_warnings(), patch.object(sft_trainer, "BaseTunerLayer", (), create=True):
            # It announces another forward pass, which the loss here does not need.
            warnings.filterwarnings("ignore", "`label_smoothing_factor` is deprecated", FutureWarning)
            super().__init__(**given | {"callbacks": [*(given.get("callbacks") or ()), own]})
        self.remove_callback(own)
        base = base_of(self.model)
        base.__dict__.pop("forward", None)
        if own.forward is not None:
            base.forward = own.forward
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise ValueError(
                "context and sequence parallelism are not supported, as SFR needs all tokens of a sample in one "
                "process: set cp_size and sp_size to 1"
            )
        adapter = getattr(self.model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False) and adapter.peft_type != PeftType.PREFIX_TUNING:
            raise ValueError(
                "peft_config must not put tokens before the batch, as prompt tuning does "
                f"(num_virtual_tokens={adapter.num_virtual_tokens}), since rows index the tokens of the batch: use "
                "LoRA, another adapter of the weights, or prefix tuning"
            )

    def _prepare_dataset(self, dataset, *args, **kwargs):
        if not self._keeps_ids and has_ids(dataset) and "input_ids" not in dataset.column_names:
            dataset = dataset.remove_columns("sample_id")  # of texts, which become other samples
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def _attach(self, sfr, encoder, targets, objective: str) -> None:
        if objective != "ce":
            targets = self._find_targets(targets, encoder, _config_of(sfr))
        attach(self.model, sfr, targets=targets, objective=objective)
        self._sfr = attachment_of(self.model)
        self._sfr.return_stats = True
        self.model_accepts_loss_kwargs = True
        if objective != "ce":
            self.data_collator = SFRCollator(self._sfr.config, targets, self.data_collator)
        (self.pop_callback(SFRCallback) or SFRCallback()).add_to(self)

    def _find_targets(self, targets, encoder, config: SFRConfig) -> TargetStore | OnlineTargets | None:
        """Numbers the prepared samples, and finds their targets."""
        sets = named_sets(self.train_dataset, self.eval_dataset)
        if isinstance(targets, str | os.PathLike):
            targets = find_targets(
                targets, sets, config, getattr(self.processing_class, "tokenizer", self.processing_class), encoder,
                whole_by_default=isinstance(self.data_collator, DataCollatorForLanguageModeling),
                masks_starts=self.padding_free,
            )  # fmt: skip
        self.train_dataset, *evaluation = number_all(sets, targets if self._keeps_ids else None).values()
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = dict(zip(self.eval_dataset, evaluation, strict=True))
        elif evaluation:
            [self.eval_dataset] = evaluation
        return targets

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "sample_id", "position_ids"]))

    def get_eval_dataloader(self, eval_dataset=None):
        self._batch_metrics["eval"].clear()  # those of a prediction are never logged
        if eval_dataset is None:
            eval_dataset = self.eval_dataset
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        return super().get_eval_dataloader(self._numbered(eval_dataset))

    def get_test_dataloader(self, test_dataset):
        return super().get_test_dataloader(self._numbered(test_dataset))

    def _numbered(self, data):
        """A data set with `sample_id`; one that the constructor has not seen is numbered, for OnlineTargets."""
        if not isinstance(self._sfr, Attachment) or has_ids(data):
            return data
        if isinstance(self._sfr.store, TargetStore):
            raise ValueError(
                "the data set to evaluate has no targets: give it to the constructor in eval_dataset (it is then "
                "trainer.eval_dataset, as prepared), or train with targets=OnlineTargets(encoder, tokenizer)"
            )
        return number(data, 0)

    def _reject_skip_prepare_without_labels(self, datasets, data_collator):
        super()._reject_skip_prepare_without_labels(datasets, getattr(data_collator, "collator", data_collator))

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The attached model's loss."""
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        if outputs.aux_loss is not None:
            loss = loss + self._router_share(num_items_in_batch) * outputs.aux_loss
        self._count(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def _router_share(self, num_items_in_batch) -> float:
        """The coefficient of the router loss, less the one by which the model has added it already, times what Trainer
        multiplied that by. It is a mean of the micro-batch, and counts as a share of the step."""
        times = steps = 1
        if num_items_in_batch is not None:
            if self.args.average_tokens_across_devices:
                times = self.accelerator.num_processes // self.get_tp_size()
            if self.model.training:
                steps = self.current_gradient_accumulation_steps
        return self.router_aux_loss_coef / steps - times * base_of(self.model).router_aux_loss_coef

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, _, _ = Trainer.prediction_step(self, model, inputs, True, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        # compute_metrics is given logits, which the loss does not make: a second forward.
        inputs = self._prepare_inputs({name: x for name, x in inputs.items() if name != "rows"})
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            return loss, model(**inputs, use_cache=False).logits, labels

    # Metrics

    def _save_checkpoint(self, model, trial) -> None:
        """With the metrics since the last log, which every process has of all."""
        means = [m.tolist() for m in self._batch_metrics["train"]]
        self.state.stateful_callbacks[_METRICS] = {"means": means, "tokens": int(self._tokens)}
        super()._save_checkpoint(model, trial)

    def _load_callback_state(self) -> None:
        """Called where a run goes on, with the state of its checkpoint."""
        super()._load_callback_state()
        if saved := self.state.stateful_callbacks.get(_METRICS):
            means = torch.tensor(saved["means"], dtype=torch.float32, device=self.args.device)
            self._batch_metrics["train"], self._tokens = [*means], saved["tokens"]

    @torch.no_grad()
    def _count(self, inputs: dict, outputs) -> None:
        """Keeps SFTTrainer's metrics of a batch on the device until they are logged. Backend "reference" has none."""
        if outputs.stats is None:
            return
        stats, mask = outputs.stats, inputs.get("attention_mask")
        tokens = inputs["labels"].numel() if mask is None else mask.sum()
        router = 0.0 if outputs.aux_loss is None else outputs.aux_loss.detach()
        sums = (stats.entropy.sum(), stats.correct.sum(), stats.entropy.numel(), router, tokens)
        sums = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=outputs.loss.device) for x in sums])
        sums = self.accelerator.reduce(sums, "sum")
        means = torch.cat([sums[:2] / sums[2].clamp(min=1), sums[3:4] / self.accelerator.num_processes])
        self._batch_metrics["train" if self.model.training else "eval"].append(means)
        if self.model.training:
            self._tokens = self._tokens + sums[4].long() // self.get_tp_size()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        if self._batch_metrics[mode]:
            means = [m.to(self.args.device) for m in self._batch_metrics[mode]]
            entropy, accuracy, router = torch.stack(means).mean(0).tolist()
            found = {"entropy": entropy, "num_tokens": float(self._tokens), "mean_token_accuracy": accuracy}
            if self.aux_loss_enabled:
                found["aux_loss"] = router
            logs.update({prefix + name: value for name, value in found.items()})
            self._batch_metrics[mode].clear()
        super().log(logs, start_time)


class _OwnForward(TrainerCallback):
    """Keeps the model's forward just before SFTTrainer replaces it by one without the SFR loss."""

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self.forward = base_of(model).__dict__.get("forward")


def _refuse_what_has_no_sfr_loss(given: dict) -> None:
    if getattr(given.get("args"), "loss_type", "nll") == "dft":
        raise ValueError("loss_type='dft' weights the cross-entropy in a way that SFR has not: leave loss_type alone")
    if given.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func would replace the SFR loss: leave it out, or attach an SFRLoss of your own")
    data = given.get("train_dataset")
    if data is not None and {"image", "images"} & set(next(iter(data), ())):
        raise ValueError("train_dataset has images, which SFRTrainer does not know how to batch: give texts alone")


def _taken_over(attached, sfr, encoder, targets, objective: str):
    """Objective and targets of a model that is attached already."""
    given = dict(sfr=sfr, encoder=encoder, targets=targets)
    if not isinstance(attached, Attachment):
        taken = LinearCrossEntropy(**attached.options), None, "ce"
    else:
        mtp = attached.config.loss == "mtp"
        if attached.store is None and not mtp:  # it has no targets, which are given here
            del given["encoder"], given["targets"]
        store = targets if attached.store is None or mtp else attached.store
        taken = SFRLoss(attached.config, attached.head, **attached.options), store, "sfr"
    if again := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{', '.join(again)} must not be given: the model is attached, and brings its own along")
    if objective == "ce" and taken[2] == "sfr":
        raise ValueError("objective must not be 'ce': the model is attached with the SFR objective; detach it first")
    if objective == "mtp" and getattr(attached.config, "loss", None) != "mtp":
        raise ValueError("objective must not be 'mtp': the model is attached with another; detach it first")
    return taken


def _config_of(sfr: SFRConfig | VelocityHead | SFRLoss) -> SFRConfig:
    """The config that targets are built by: for a head alone, the default."""
    return sfr if isinstance(sfr, SFRConfig) else getattr(sfr, "config", SFRConfig())


def _check_targets(sfr, targets, encoder, objective: str):
    """The targets, or the folder for them; None for an objective without targets."""
    none = f"objective={objective!r}" if objective != "sfr" else "loss='mtp'" if _config_of(sfr).loss == "mtp" else None
    if none is not None:
        for name, value in (("targets", targets), ("encoder", encoder)):
            if value is not None:
                raise ValueError(f"{name} has no meaning with {none}: leave it out")
        return None
    if targets is None or isinstance(targets, str | os.PathLike):
        return FOLDER if targets is None else targets
    if not isinstance(targets, OnlineTargets | TargetStore):
        raise TypeError(f"targets must be a folder, OnlineTargets or a TargetStore, got {type(targets).__name__}")
    if encoder is not None:
        raise ValueError(f"encoder must not be given with {type(targets).__name__}, which embeds or holds the targets")
    return targets
