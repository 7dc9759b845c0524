"""`attach` computes the model's own loss, or refuses: tables of the architectures that it takes and does not take."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from outcomes import assert_same, gradients
from tiny import HIDDEN, SIZES, VOCAB, tiny_llama
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from sfr_kernels import attach, detach
from sfr_kernels.training.objectives import attachment_of
from sfr_kernels.training.own_loss import _plain_token

# What sizes are called beside SIZES; an architecture is given those that its configuration has.
NAMES = SIZES | dict(
    head_dim=8, moe_intermediate_size=16, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    n_embd=HIDDEN, n_head=4, n_layer=2, n_positions=64, d_model=HIDDEN, n_heads=4, n_layers=2, max_seq_len=64,
    decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, encoder_layers=2, encoder_attention_heads=4,
    encoder_ffn_dim=48, ffn_dim=48, emb_dim=HIDDEN, embed_dim=HIDDEN,
)  # fmt: skip
LATENT = dict(
    q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, head_dim=4, n_group=1,
    topk_group=1, num_key_value_heads=4,
)  # fmt: skip
STATE = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=4)
DELTA = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip

# Causal LMs by model type, and what of their configuration a tiny one needs; None: leave out.
PLAIN = """
    afmoe apertus arcee bert biogpt bitnet bloom cohere2 diffllama electra ernie4_5 exaone4 falcon_mamba gemma
    gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss granitemoe helium hunyuan_v1_dense jetmoe lfm2
    llama llama4_text mamba ministral mistral modernbert-decoder mpt nemotron olmo olmo2 olmo3 olmoe openai-gpt opt
    persimmon phi phi3 phimoe qwen3 qwen3_moe roberta seed_oss smollm3 stablelm starcoder2 vaultgemma xglm
    xlm-roberta
"""  # bert shifts; gpt2 has another tree of modules; phi's lm_head has a bias
ACCEPTED = {name: {} for name in PLAIN.split()} | {
    "bamba": {**STATE, "attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "codegen": {"rotary_dim": 8},
    "cohere": {"logit_scale": 0.25},  # scale on the logits
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon": {"head_dim": None},
    "gemma2": {"final_logit_softcapping": 5.0},  # softcap
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 8.0},  # divisor of the logits
    "granitemoehybrid": {**STATE, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 4},
    "minicpm3": LATENT,
    "mixtral": {"output_router_logits": True},  # the router's loss on top
    "nanochat": {"final_logit_softcapping": 5.0},
    "qwen2": {"tie_word_embeddings": True},  # one tensor for input and output embeddings
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": HIDDEN},
}
ACCEPTED = dict(sorted(ACCEPTED.items()))


def tiny_config(model_type: str, **overrides):
    default = AutoConfig.for_model(model_type)
    other = default.attribute_map  # names that stand for others
    sizes = {k: v for k, v in NAMES.items() if hasattr(default, k) and other.get(k) not in NAMES}
    sizes |= overrides
    return AutoConfig.for_model(model_type, **{k: v for k, v in sizes.items() if v is not None})


def tiny_causal_lm(model_type: str, auto=AutoModelForCausalLM, **overrides):
    """In evaluation; with logits large enough for a softcap to matter."""
    torch.manual_seed(0)
    model = auto.from_config(tiny_config(model_type, **{**ACCEPTED.get(model_type, {}), **overrides})).eval()
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(20)
        if head.bias is not None:
            head.bias.normal_()
    return model


def batch() -> dict:
    ids = torch.randint(5, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 3] = labels[1, 5] = -100
    return {"input_ids": ids, "labels": labels}


def losses_and_gradients(model, **more):
    """Of the mean, and of the sum divided by num_items_in_batch."""
    model.zero_grad()
    mean, divided = model(**batch(), **more).loss, model(**batch(), **more, num_items_in_batch=torch.tensor(9)).loss
    mean.backward()
    return torch.stack([mean, divided]).detach(), gradients(model)


def assert_own(model, **more):
    """The losses and gradients of a model are the same before it is attached and after."""
    wanted, grads = losses_and_gradients(model, **more)
    losses, own = losses_and_gradients(attach(model, objective="ce"), **more)
    assert_same(losses, wanted, rtol=1e-5, atol=1e-6)
    assert len(grads) > 4
    assert_same(own, grads, rtol=1e-4, atol=1e-6 * max(grad.abs().max().item() for grad in grads.values()))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("model_type", ACCEPTED)
def test_an_accepted_model_has_its_own_loss_and_gradients(model_type):
    assert_own(tiny_causal_lm(model_type))


class Quantised(nn.Linear):
    """As quantisers derive theirs."""

    def forward(self, hidden):
        return F.linear(hidden, self.weight.round(decimals=1), self.bias)


def doubled(hidden):
    return 2 * hidden


def with_head(change):
    model = tiny_llama().eval()
    change(model)
    return model


def lm_head_with(name: str, value):
    return lambda: with_head(lambda model: setattr(model.lm_head, name, value))


def with_weight(weight):
    return lm_head_with("weight", nn.Parameter(weight, requires_grad=False))


def smoothed(logits, labels, vocab_size, num_items_in_batch=None, **options):
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1, reduction="sum")
    return loss / ((labels[:, 1:] >= 0).sum() if num_items_in_batch is None else num_items_in_batch)


def always_mean(logits, labels, vocab_size, num_items_in_batch=None, **options):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def with_loss(function):
    return lambda: with_head(lambda model: setattr(model, "loss_function", function))


def with_hook(hook):
    return lambda: with_head(lambda model: model.lm_head.register_forward_hook(hook))


def with_forward(logits, loss=True, shown=True):
    """A Llama whose forward is its user's own; `logits` of the model and its hidden states."""

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **options):
        made = logits(self, self.model(input_ids).last_hidden_state)
        wanted = loss and labels is not None
        value = self.loss_function(made, labels, VOCAB, num_items_in_batch) if wanted else None
        return transformers.modeling_outputs.CausalLMOutput(loss=value, logits=made if shown else None)

    own = type("Own", (transformers.LlamaForCausalLM,), dict(forward=forward))
    return lambda: own(transformers.LlamaConfig(**SIZES)).eval()


def own_logits(self, hidden):
    return self.lm_head(hidden)


def cubed(self, hidden):
    return self.lm_head(hidden) ** 3


def without_lm_head(self, hidden):
    return F.linear(hidden, self.lm_head.weight)


def chameleon():
    """The classes of image tokens are masked after the lm_head."""
    images = {f"IMGIMG{letter}Z": 60 + i for i, letter in enumerate("ABCDEFGH")}
    vq = dict(embed_dim=8, num_embeddings=8, base_channels=32, channel_multiplier=[1], num_res_blocks=1, resolution=16,
              latent_channels=4)  # fmt: skip
    config = transformers.ChameleonConfig(**SIZES, vq_config=vq, vocabulary_map=images | {"<image>": 90})
    return transformers.ChameleonForConditionalGeneration(config).eval()


def causal(model_type, auto=AutoModelForCausalLM, **overrides):
    return lambda: tiny_causal_lm(model_type, auto, **overrides)


def test_a_forward_without_logits_and_a_router_loss_that_only_a_batch_asks_for_are_the_models_own():
    assert_own(with_forward(own_logits, shown=False)())
    assert_own(tiny_causal_lm("jetmoe"), output_router_logits=True)  # whose weight has a name of its own


WEIGHT = torch.ones(VOCAB, HIDDEN, dtype=torch.float32)
UNSHIFTED = "does not shift its labels"
# What attach sees, by name: how to make one, and words of the reason.
REFUSED_AT_ONCE = {
    "T5ForConditionalGeneration": (causal("t5", AutoModelForSeq2SeqLM, d_kv=8, d_ff=48), "is an encoder-decoder"),
    "BartForConditionalGeneration": (causal("bart", AutoModelForSeq2SeqLM), "is an encoder-decoder"),
    "BertModel": (lambda: transformers.BertModel(tiny_config("bert")), "no lm_head: .*ForCausalLM, got BertModel"),
    "a class of nn.Linear with its own forward": (lm_head_with("__class__", Quantised), "Quantised, whose forward"),
    "a replaced forward of the lm_head": (lm_head_with("forward", doubled), "forward of model's lm_head was replaced"),
    "a weight of int8": (with_weight(WEIGHT.to(torch.int8)), "Parameter of torch.int8"),
    "a weight of float8": (with_weight(WEIGHT.to(torch.float8_e4m3fn)), "Parameter of torch.float8_e4m3fn"),
    "a weight of a tensor subclass": (with_weight(TwoTensor(WEIGHT, WEIGHT.clone())), "TwoTensor of torch.float32"),
    "a wrapped model": (lambda: nn.DataParallel(tiny_llama()), "wrapped in DataParallel: attach the model inside"),
}
# What the first loss shows.
NO_SHIFT = {
    "Bart": "bart", "BigBirdPegasus": "bigbird_pegasus", "Blenderbot": "blenderbot",
    "BlenderbotSmall": "blenderbot-small", "CpmAnt": "cpmant", "Marian": "marian", "MBart": "mbart", "Mvp": "mvp",
    "Pegasus": "pegasus", "PLBart": "plbart", "TrOCR": "trocr", "Whisper": "whisper",
}  # fmt: skip
REFUSED_AT_THE_FIRST_LOSS = {
    f"{name}ForCausalLM": (causal(kind, attention_type="original_full"), UNSHIFTED)  # BigBirdPegasus has such types
    for name, kind in NO_SHIFT.items()
} | {
    "XLMWithLMHeadModel": (causal("xlm"), UNSHIFTED),
    "XLNetLMHeadModel": (causal("xlnet", num_hidden_layers=None, max_position_embeddings=None, d_inner=48), UNSHIFTED),
    "BertForMaskedLM": (causal("bert", AutoModelForMaskedLM), UNSHIFTED),
    "RobertaForMaskedLM": (causal("roberta", AutoModelForMaskedLM), UNSHIFTED),
    "ChameleonForConditionalGeneration": (chameleon, "changes 8 of 96 classes after the lm_head.*: 60, 61, 62"),
    "InklingForCausalLM": (causal("inkling_text", unpadded_vocab_size=90), r"\(1, 6, 90\) of its lm_head's \(1, 6, 96"),
    "ProphetNetForCausalLM": (causal("prophetnet", num_hidden_layers=None), "must run once on 6 token ids.*batch_size"),
    "a hook that changes the logits": (with_hook(lambda module, args, out: 2 * out), "hook on the lm_head"),
    "a hook that writes over the logits": (with_hook(lambda module, args, out: out.mul_(2)), "hook on the lm_head"),
    "a loss function of the user": (with_loss(smoothed), "not next-token cross-entropy: [0-9.]+, not [0-9.]+"),
    "a loss without num_items_in_batch": (with_loss(always_mean), "divides its loss by another number"),
    "a transform that the loss lacks": (with_forward(cubed), "in a way the loss does not know"),
    # as a package has it that puts a fused loss of its own into the model
    "a forward without the lm_head": (with_forward(without_lm_head, shown=False), "does not call its lm_head"),
    "a forward without a loss": (with_forward(own_logits, loss=False), "returns no loss"),
}
REFUSED = REFUSED_AT_ONCE | REFUSED_AT_THE_FIRST_LOSS


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_model_is_told_why_and_left_as_it_was(name):
    build, reason = REFUSED[name]
    model = build()
    state, attributes = list(model.state_dict()), [(m, set(m.__dict__)) for m in model.modules()]
    if name in REFUSED_AT_ONCE:
        with pytest.raises((TypeError, ValueError), match=reason):
            attach(model, objective="ce")
    else:
        attach(model, objective="ce")
        for _ in range(2):  # and not only once
            with pytest.raises(RuntimeError if name.startswith("ProphetNet") else ValueError, match=reason):
                model(**batch())
        detach(model)
    assert list(model.state_dict()) == state and attachment_of(model) is None
    assert [(m, set(m.__dict__)) for m in model.modules()] == attributes


def test_a_hook_that_comes_later_is_looked_at_when_it_comes():
    model = attach(tiny_llama().eval(), objective="ce")
    wanted = model(**batch()).loss
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out + 1e-3)
    with pytest.raises(ValueError, match="hook on the lm_head"):
        model(**batch())
    handle.remove()
    assert model(**batch()).loss == wanted


def test_logits_that_are_rounded_to_16_bits_are_the_models_own():
    model = tiny_causal_lm("gemma2")
    wanted = model(**batch()).loss
    model.lm_head.register_forward_hook(lambda module, args, out: out.bfloat16())  # as an engine does
    torch.testing.assert_close(attach(model, objective="ce")(**batch()).loss.float(), wanted, rtol=1e-2, atol=0)
    assert model._sfr_own_loss.options["softcap"] == 5.0


def test_the_probe_leaves_the_generators_of_random_numbers_alone():
    model = attach(tiny_causal_lm("gpt2").train(), objective="ce")  # which has dropout
    state = torch.get_rng_state()
    model._sfr_own_loss.measure(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state) and model._sfr_own_loss.options is not None


def test_the_token_of_the_probe_has_no_meaning_of_its_own():
    config = tiny_config("llama", pad_token_id=0, bos_token_id=1, eos_token_id=[2, 4])
    assert _plain_token(config, VOCAB) == 3
    text = tiny_config("llama").to_dict()
    assert _plain_token(transformers.LlavaConfig(text_config=text, image_token_index=3), VOCAB) == 4
    assert _plain_token(config, 3) == 0  # all have one
