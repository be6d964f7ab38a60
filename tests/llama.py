"""A tiny Llama of random weights: mlx-lm's class, a Hugging Face folder, batches for it."""

from __future__ import annotations

import json
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TOKENS = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (2, 9))


class TextBatch(NamedTuple):
    """As :mod:`mlx_fit.text` makes them."""

    tokens: object
    targets: object
    weights: object
    segments: object


def make_llama(seed=0, **config):
    """mlx-lm's own class."""
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG | config))
    mx.eval(model.parameters())
    return model


def save_llama(model, folder):
    """The model as a Hugging Face folder, which transformers and mlx-lm read."""
    config = CONFIG | {key: getattr(model.args, key) for key in CONFIG if hasattr(model.args, key)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder


def logits(model, tokens=TOKENS):
    """In evaluation mode, as NumPy."""
    training = model.training
    model.eval()
    found = np.array(model(mx.array(tokens)).astype(mx.float32))
    model.train(training)
    return found


def shake(model, seed=7, scale=0.1):
    """Give everything that trains other values, as training would."""
    rng = np.random.default_rng(seed)
    for _, module in model.named_modules():
        for key, value in list(module.items()):
            if isinstance(value, mx.array) and key not in module._no_grad:
                noise = mx.array(rng.normal(size=value.shape, scale=scale), mx.float32)
                module[key] = (value + noise).astype(value.dtype)
    return model


def text_batches(num_batches=2, rows=4, length=12, seed=0):
    """Rows that count to 8 from a random token, with a short, padded row in each batch."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num_batches):
        row = (rng.integers(0, 8, (rows, 1)) + np.arange(length + 1)).astype(np.int32) % 8
        weights = np.ones((rows, length), np.float32)
        weights[0, length // 2 :] = 0
        segments = np.where(weights > 0, 1, 0).astype(np.int32)
        found.append(TextBatch(row[:, :-1], row[:, 1:], weights, segments))
    return found
