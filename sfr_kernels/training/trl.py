"""`SFRTrainer`: TRL's SFTTrainer, trained on the SFR objective.

SFTTrainer makes its loss itself, of the trunk's output and the lm_head's weight, and never calls the forward in which
an attached model has its loss. Here it does what comes before that: it loads the model, wraps it with PEFT, and
tokenizes, cuts and packs the data. Then the targets of the prepared data are built, the model is attached, and the loss
is the model's own, as `transformers.Trainer` asks for it.
"""

import inspect
import os
import warnings

import torch
from peft import PeftType
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..config import SFRConfig
from ..modules import LinearCrossEntropy, SFRLoss, VelocityHead
from ..targets import OnlineTargets, SFRCollator, TargetStore, load_encoder
from .attach import attach, base_of, detach
from .callbacks import SFRCallback
from .objectives import Attachment, attachment_of

try:
    from trl import SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
except ImportError as error:
    raise ImportError(f"SFRTrainer needs trl ({error}): pip install 'sfr_kernels[trl]'") from error

from .prepared import check_folder, find_targets, has_ids, named_sets, number, number_all

FOLDER = "targets"


class SFRTrainer(SFTTrainer):
    """SFTTrainer with the SFR objective; its own arguments mean what they mean there.

        trainer = SFRTrainer(
            model="Qwen/Qwen3-0.6B",
            args=SFTConfig("out", packing=True),
            train_dataset=train,
            eval_dataset=test,
            peft_config=LoraConfig(),
            encoder="sentence-transformers/all-MiniLM-L6-v2",
        )
        trainer.train()

    sfr        the objective, as in `attach`: an SFRConfig (by default SFRConfig()), a VelocityHead or an SFRLoss; with
               objective "ce" nothing, or a LinearCrossEntropy.
    encoder    the SentenceTransformer that embeds the targets, or its name or path.
    targets    a folder, by default "targets": the targets of the prepared data are built there, or opened if they are
               there already. Or OnlineTargets, which need nothing ahead: the choice for an IterableDataset. Or a
               TargetStore of one's own.
    objective  "sfr", or "ce": cross-entropy alone, fused. It has no encoder and no targets, nor has loss="mtp".

    A model that is attached already brings its objective and its targets along; neither is given again here. Logged is
    what SFTTrainer logs, and `ce_loss`, `flow_loss` and `flow_weight`. ValueError, before anything is trained, for what
    would replace the loss (loss_type="dft", compute_loss_func) and for data without targets.
    """

    def __init__(
        self,
        *args,
        sfr: SFRConfig | VelocityHead | SFRLoss | LinearCrossEntropy | None = None,
        encoder=None,  # SentenceTransformer or str
        targets: str | os.PathLike | OnlineTargets | TargetStore | None = None,
        objective: str = "sfr",
        **kwargs,
    ):
        given = inspect.signature(SFTTrainer.__init__).bind(self, *args, **kwargs).arguments
        del given["self"]
        _refuse_what_has_no_sfr_loss(given)
        model = given["model"]
        found = attachment_of(model) if isinstance(model, nn.Module) else None
        if found is not None:
            sfr, targets, objective = _brought_along(found, sfr, encoder, targets, objective)
        sfr = _check_objective(sfr, objective)
        targets = _check_targets(sfr, targets, encoder, objective)
        if isinstance(targets, str | os.PathLike):
            check_folder(targets, encoder, named_sets(given.get("train_dataset"), given.get("eval_dataset")))
        self._goes_by_ids = isinstance(targets, TargetStore)  # those that the data had when its maker built it
        if isinstance(encoder, str):
            encoder = load_encoder(encoder)
        if isinstance(given.get("data_collator"), SFRCollator):
            given["data_collator"] = given["data_collator"].collator
        if found is not None:
            detach(model)  # PEFT goes around a plain model
        try:
            self._prepare(given)
            self._attach(sfr, encoder, targets, objective)
        except BaseException:
            if found is not None and attachment_of(model) is None:
                attach(model, sfr, targets=found.store, objective=objective)
            raise
        self._seen: dict[str, list[Tensor]] = {"train": [], "eval": []}  # since the last log, of every batch
        self._tokens: Tensor | int = 0  # trained on so far

    def _prepare(self, given: dict) -> None:
        """SFTTrainer's constructor, after which the model has its own forward again."""
        noted = _OwnForward()
        with warnings.catch_warnings():
            # of another forward pass, which the loss here does not need
            warnings.filterwarnings("ignore", "`label_smoothing_factor` is deprecated", FutureWarning)
            super().__init__(**given | {"callbacks": [*(given.get("callbacks") or ()), noted]})
        self.remove_callback(noted)
        noted.put_back(self.model)
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise ValueError(
                "context and sequence parallelism cut the tokens of a sample among processes, of which SFR needs all "
                "on one: set cp_size and sp_size to 1"
            )
        adapter = getattr(self.model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False) and adapter.peft_type != PeftType.PREFIX_TUNING:
            raise ValueError(
                "peft_config must not put tokens before the batch, as prompt tuning does, that the rows of the loss do "
                "not know of: use LoRA, another adapter of the weights, or prefix tuning"
            )

    def _prepare_dataset(self, dataset, *args, **kwargs):
        if not self._goes_by_ids and has_ids(dataset) and "input_ids" not in dataset.column_names:
            dataset = dataset.remove_columns("sample_id")  # a text's, which says nothing of the targets
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def _attach(self, sfr, encoder, targets, objective: str) -> None:
        if objective == "sfr":
            targets = self._find_targets(targets, encoder, _config_of(sfr))
        attach(self.model, sfr, targets=targets, objective=objective)
        self._sfr = attachment_of(self.model)
        self._sfr.return_stats = True
        self.model_accepts_loss_kwargs = True
        if objective == "sfr":
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
        self.train_dataset, *evaluation = number_all(sets, targets if self._goes_by_ids else None).values()
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = dict(zip(self.eval_dataset, evaluation, strict=True))
        elif evaluation:
            [self.eval_dataset] = evaluation
        return targets

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "sample_id", "position_ids"]))

    def get_eval_dataloader(self, eval_dataset=None):
        self._seen["eval"].clear()  # of a prediction, which is not logged
        if eval_dataset is None:
            eval_dataset = self.eval_dataset
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        return super().get_eval_dataloader(self._numbered(eval_dataset))

    def get_test_dataloader(self, test_dataset):
        return super().get_test_dataloader(self._numbered(test_dataset))

    def _numbered(self, data):
        """A data set that was not there when the targets were made."""
        if not isinstance(self._sfr, Attachment) or has_ids(data):
            return data
        if isinstance(self._sfr.store, TargetStore):
            raise ValueError(
                "the data set to evaluate has no targets: give it to the constructor in eval_dataset, where they are "
                "built (those given there are trainer.eval_dataset, as prepared), or train with "
                "targets=OnlineTargets(encoder, tokenizer), which need nothing ahead"
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
        """What is missing of the router loss: it is a mean of the micro-batch, which must count as a share of the
        step, by TRL's coefficient; the model has added all of it, by its own, and Trainer multiplied it."""
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
        # compute_metrics wants logits, which the loss does not make.
        inputs = self._prepare_inputs({name: x for name, x in inputs.items() if name != "rows"})
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            return loss, model(**inputs, use_cache=False).logits, labels

    # Metrics

    @torch.no_grad()
    def _count(self, inputs: dict, outputs) -> None:
        """Keeps the metrics of a batch, those of SFTTrainer, on the device: they are read when they are logged. The
        backend "reference" has no statistics, and then there are none."""
        if outputs.stats is None:
            return
        stats, mask = outputs.stats, inputs.get("attention_mask")
        tokens = inputs["labels"].numel() if mask is None else mask.sum()
        router = 0.0 if outputs.aux_loss is None else outputs.aux_loss.detach()
        sums = (stats.entropy.sum(), stats.correct.sum(), stats.entropy.numel(), router, tokens)
        sums = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=outputs.loss.device) for x in sums])
        sums = self.accelerator.reduce(sums, "sum")
        means = sums[:2] / sums[2].clamp(min=1)
        processes = self.accelerator.num_processes
        self._seen["train" if self.model.training else "eval"].append(torch.cat([means, sums[3:4] / processes]))
        if self.model.training:
            self._tokens = self._tokens + sums[4].long() // self.get_tp_size()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        if self._seen[mode]:
            entropy, accuracy, router = torch.stack(self._seen[mode]).mean(0).tolist()
            found = {"entropy": entropy, "num_tokens": float(self._tokens), "mean_token_accuracy": accuracy}
            if self.aux_loss_enabled:
                found["aux_loss"] = router
            logs.update({prefix + name: value for name, value in found.items()})
            self._seen[mode].clear()
        super().log(logs, start_time)


class _OwnForward(TrainerCallback):
    """Notes the model's forward just before SFTTrainer covers it with one that knows no SFR loss."""

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self.forward = base_of(model).__dict__.get("forward")

    def put_back(self, model: nn.Module) -> None:
        base = base_of(model)
        base.__dict__.pop("forward", None)
        if self.forward is not None:
            base.forward = self.forward


def _refuse_what_has_no_sfr_loss(given: dict) -> None:
    if getattr(given.get("args"), "loss_type", "nll") == "dft":
        raise ValueError("loss_type='dft' weights the cross-entropy in a way that SFR has not: leave loss_type alone")
    if given.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func would replace the SFR loss: leave it out, or attach an SFRLoss of your own and give "
            "the model"
        )
    data = given.get("train_dataset")
    if data is not None and {"image", "images"} & set(next(iter(data), ())):
        raise ValueError("train_dataset has images, which SFRTrainer does not know how to batch: give texts alone")


def _brought_along(found, sfr, encoder, targets, objective: str):
    """Objective and targets of a model that is attached already."""
    named = dict(sfr=sfr, encoder=encoder, targets=targets)
    if not isinstance(found, Attachment):
        taken = LinearCrossEntropy(**found.options), None, "ce"
    else:
        if found.store is None and found.config.loss != "mtp":
            del named["encoder"], named["targets"]  # it has none to bring
        store = targets if found.store is None or found.config.loss == "mtp" else found.store
        taken = SFRLoss(found.config, found.head, **found.options), store, "sfr"
    if again := [name for name, value in named.items() if value is not None]:
        raise ValueError(f"{', '.join(again)} must not be given: the model is attached, and brings its own along")
    if objective == "ce" and taken[2] == "sfr":
        raise ValueError("objective must not be 'ce': the model is attached with the SFR objective; detach it first")
    return taken


def _config_of(sfr: SFRConfig | VelocityHead | SFRLoss) -> SFRConfig:
    """What targets are built by: a head alone comes with the default config of its sizes."""
    return sfr if isinstance(sfr, SFRConfig) else getattr(sfr, "config", SFRConfig())


def _check_objective(sfr, objective: str):
    """What `attach` is to be given. It would refuse the same, but the data are prepared before."""
    if objective not in ("sfr", "ce"):
        raise ValueError(f"objective must be sfr or ce, got {objective!r}")
    if objective == "sfr" and sfr is None:
        return SFRConfig()
    kinds = (SFRConfig, VelocityHead, SFRLoss) if objective == "sfr" else (LinearCrossEntropy, type(None))
    if not isinstance(sfr, kinds):
        names = [kind.__name__.replace("NoneType", "None") for kind in kinds]
        raise TypeError(f"sfr must be {' or '.join(names)} with objective={objective!r}, got {type(sfr).__name__}")
    return sfr


def _check_targets(sfr, targets, encoder, objective: str):
    """The targets, or the folder where they are to be; None for an objective that has none."""
    none = "objective='ce'" if objective == "ce" else "loss='mtp'" if _config_of(sfr).loss == "mtp" else None
    if none is not None:
        for name, value in (("targets", targets), ("encoder", encoder)):
            if value is not None:
                raise ValueError(f"{name} has no meaning with {none}: leave it out")
        return None
    if targets is None:
        return FOLDER
    if isinstance(targets, str | os.PathLike):
        return targets
    if not isinstance(targets, OnlineTargets | TargetStore):
        raise TypeError(f"targets must be a folder, OnlineTargets or a TargetStore, got {type(targets).__name__}")
    if encoder is not None:
        raise ValueError(f"encoder must not be given with {type(targets).__name__}, which embeds or holds the targets")
    return targets
