"""Models of Hugging Face, tiny and random, with masks and dropout: each agrees with a loop over the model itself."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # made from configurations: nothing is fetched

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import oracle
import pegrad
from pegrad import trees

# A batching rule that PyTorch lacks; peft, which calls what transformers renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

B, T, V = 4, 7, 30


@dataclass(frozen=True)
class Model:
    """How to make a model, and a batch for it."""

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]


def tokens() -> Tensor:
    return torch.randint(3, V, (B, T))


def mask() -> Tensor:
    """Padding at the end of some examples, of different lengths."""
    return (torch.arange(T) < torch.tensor([T, T - 2, T, 3])[:, None]).long()


def classes() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "attention_mask": mask(), "labels": torch.arange(B) % 3}


def language() -> dict[str, Tensor]:
    ids = tokens()
    return {"input_ids": ids, "attention_mask": mask(), "labels": ids.masked_fill(mask() == 0, -100)}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(B, 3, 16, 16, dtype=torch.float64), "labels": torch.arange(B) % 3}


def translation() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "attention_mask": mask(), "labels": tokens()}


def spectrogram() -> dict[str, Tensor]:
    return {"input_features": torch.randn(B, 8, 12, dtype=torch.float64), "labels": tokens()}


def sound() -> dict[str, Tensor]:
    lengths = torch.tensor([400, 300, 400, 200])
    return {
        "input_values": torch.randn(B, 400, dtype=torch.float64),
        "attention_mask": (torch.arange(400) < lengths[:, None]).long(),
        "labels": torch.arange(B) % 3,
    }


ENCODER = {
    "vocab_size": V,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
DECODER = {
    "vocab_size": V,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "num_labels": 3,
    "hidden_dropout_prob": 0.1,
}


def of(model: Any, config: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: model(config(**options))


def lora() -> nn.Module:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)
    model = peft.get_peft_model(hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then lora_A has no gradient
            nn.init.normal_(parameter)
    return model


MODELS = {
    "bert": Model(of(hf.BertForSequenceClassification, hf.BertConfig, **ENCODER), classes),
    "roberta": Model(of(hf.RobertaForSequenceClassification, hf.RobertaConfig, **ENCODER), classes),
    "distilbert": Model(
        of(
            hf.DistilBertForSequenceClassification,
            hf.DistilBertConfig,
            vocab_size=V,
            dim=8,
            n_layers=2,
            n_heads=2,
            hidden_dim=12,
            max_position_embeddings=16,
            num_labels=3,
        ),
        classes,
    ),
    "gpt2": Model(
        of(hf.GPT2LMHeadModel, hf.GPT2Config, vocab_size=V, n_embd=8, n_layer=2, n_head=2, n_positions=16), language
    ),
    "llama": Model(of(hf.LlamaForCausalLM, hf.LlamaConfig, **DECODER), language),
    "t5": Model(
        of(
            hf.T5ForConditionalGeneration,
            hf.T5Config,
            vocab_size=V,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        translation,
    ),
    "vit": Model(of(hf.ViTForImageClassification, hf.ViTConfig, **VISION), pixels),
    "mamba": Model(
        of(hf.MambaForCausalLM, hf.MambaConfig, vocab_size=V, hidden_size=8, state_size=4, num_hidden_layers=2),
        language,
    ),
    "mixtral": Model(
        of(hf.MixtralForCausalLM, hf.MixtralConfig, **DECODER, num_local_experts=3, experts_implementation="eager"),
        language,
    ),
    "swin": Model(
        of(
            hf.SwinForImageClassification,
            hf.SwinConfig,
            image_size=16,
            patch_size=2,
            embed_dim=4,
            depths=[2, 1],
            num_heads=[1, 2],
            window_size=4,
            num_labels=3,
        ),
        pixels,
    ),
    "whisper": Model(
        of(
            hf.WhisperForConditionalGeneration,
            hf.WhisperConfig,
            vocab_size=V,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=12,
            decoder_ffn_dim=12,
            num_mel_bins=8,
            max_source_positions=6,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        spectrogram,
    ),
    "wav2vec2": Model(
        of(
            hf.Wav2Vec2ForSequenceClassification,
            hf.Wav2Vec2Config,
            vocab_size=V,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            conv_dim=(8, 8),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            num_labels=3,
            classifier_proj_size=6,
            mask_time_prob=0.0,
        ),
        sound,
    ),
    "convnext": Model(
        of(
            hf.ConvNextForImageClassification,
            hf.ConvNextConfig,
            hidden_sizes=[4, 8],
            depths=[1, 1],
            num_stages=2,
            num_labels=3,
        ),
        pixels,
    ),
    "beit": Model(of(hf.BeitForImageClassification, hf.BeitConfig, **VISION, use_relative_position_bias=True), pixels),
    "gemma3": Model(of(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, **DECODER, sliding_window=4), language),
    "qwen3": Model(of(hf.Qwen3ForCausalLM, hf.Qwen3Config, **DECODER), language),
    "llama with lora": Model(lora, language),
}


class Wide(TorchFunctionMode):
    """Inside the block, what a model computes in float32 whatever it is given is computed in float64.

    Without it the loop's own rounding would hide all errors below 1e-7.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


def make(name: str, *, train: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name].make().double().train(train)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # nothing stays zero
    return model, MODELS[name].batch()


def loop(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Per-example gradients by the model itself, on batches of one."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for b in range(B):
        torch.manual_seed(b)
        with Wide():
            value = model(**{name: leaf[b : b + 1] for name, leaf in batch.items()}).loss
        rows.append(torch.autograd.grad(value, list(own.values()), allow_unused=True, materialize_grads=True))
    return trees.leaves(dict(zip(own, map(torch.stack, zip(*rows, strict=True)), strict=True)))


def assert_close(actual: Any, expected: list[Tensor]) -> None:
    """Compare to 1e-8 leaf by leaf; a leaf next to zero, such as the bias of keys, by a millionth of the whole."""
    whole = max(leaf.abs().max() for leaf in expected)
    for got, want in zip(trees.leaves(actual), expected, strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 1e-8 * want.abs().max().clamp(min=1e-6 * whole)


def clipped_grad(model: nn.Module, clip_norm: float, strategy: str) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    apply, params = pegrad.from_module(model)

    def loss(params: Any, example: Any) -> Tensor:
        with Wide():
            return apply(params, **example).loss

    return pegrad.clipped_grad(loss, clip_norm=clip_norm, strategy=strategy), params


def without_mask(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in batch.items() if name != "attention_mask"}


MASKED = [name for name in MODELS if name not in ("vit", "swin", "whisper", "convnext", "beit")]
DROPPING = ["bert", "gpt2", "t5", "vit", "swin", "whisper", "llama with lora"]


def assert_exact(name: str, change: Callable[[Any], Any], strategy: str) -> None:
    model, batch = make(name, train=False)
    batch = change(batch)
    grads = loop(model, batch)
    clip_norm = oracle.norms(grads).median().item()
    function, params = clipped_grad(model, clip_norm, strategy)
    out = function(params, hf.BatchEncoding(batch))
    assert_close(out.grads, oracle.clipped_sum(grads, clip_norm))
    assert_close(out.norms, [oracle.norms(grads)])


@pytest.mark.parametrize("name", MODELS)
def test_the_loop_by_from_module(name):
    """Catches: arguments, outputs, tied or frozen weights that `from_module` takes for what they are not."""
    assert_exact(name, dict, "naive")


@pytest.mark.parametrize("name", MODELS)
def test_clipped_gradients(name):
    """Catches: a model that runs and comes out wrong, or that does not run."""
    assert_exact(name, dict, "auto")


@pytest.mark.parametrize("name", MASKED)
def test_clipped_gradients_without_a_mask(name):
    """Catches: the same, of models that take another path then."""
    assert_exact(name, without_mask, "auto")


def assert_exact_with_dropout(name: str, change: Callable[[Any], Any]) -> None:
    """Compare one example at a time, from equal seeds."""
    model, batch = make(name, train=True)
    batch = change(batch)
    grads = loop(model, batch)
    function, params = clipped_grad(model, 1e9, "auto")
    for b in range(B):
        torch.manual_seed(b)
        out = function(params, {name: leaf[b : b + 1] for name, leaf in batch.items()})
        assert_close(out.grads, [grad[b] for grad in grads])


@pytest.mark.parametrize("name", DROPPING)
def test_dropout(name):
    """Catches: other random numbers than the loop's from the same seed; a mask drawn once more on the way back."""
    assert_exact_with_dropout(name, dict)


@pytest.mark.parametrize("name", [name for name in DROPPING if name in MASKED])
def test_dropout_without_a_mask(name):
    """Catches: the same, of models that take another path then."""
    assert_exact_with_dropout(name, without_mask)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "qwen3"])
def test_activation_checkpointing(name):
    """Catches: layers run again with the model's own weights, or with other random numbers; or not run again."""
    model, batch = make(name, train=True)
    batch = without_mask(batch)
    grads = loop(model, batch)
    model.activation_checkpointing_enable()
    function, params = clipped_grad(model, 1e9, "auto")
    with pytest.raises(pegrad.StrategyError, match=r"pegrad\.checkpoint"):
        function(params, batch)
    runs = []

    def checkpoint(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            runs.append(layer)
            return layer(*args, **kwargs)

        return pegrad.checkpoint(run, *args, **kwargs)

    model._set_gradient_checkpointing(gradient_checkpointing_func=checkpoint)
    for b in range(B):
        torch.manual_seed(b)
        out = function(params, {name: leaf[b : b + 1] for name, leaf in batch.items()})
        assert_close(out.grads, [grad[b] for grad in grads])
    assert len(runs) >= 2 * 2 * B  # two layers, forward and back
