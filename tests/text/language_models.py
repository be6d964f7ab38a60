"""Tiny random models of mlx-lm, and one of our own that takes segments."""

from __future__ import annotations

import importlib

import mlx.core as mx
import mlx.nn as nn

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
}
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8.0}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "sliding_window": 6, "sliding_window_pattern": 2},
    "gpt2": dict.fromkeys(["n_ctx", "n_positions"], 64)
    | {"n_embd": 32, "n_head": 4, "n_layer": 2, "layer_norm_epsilon": 1e-5},
    "mamba": {"state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True}
    | {"time_step_rank": 4},
}


def mlx_lm_model(family):
    """A random model of 2 layers and 64 tokens."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    settings = {"model_type": family, **COMMON, **FAMILIES[family]}
    model = module.Model(module.ModelArgs.from_dict(settings))
    mx.eval(model.parameters())
    return model


class WithSegments(nn.Module):
    """Attention over segments; with ``ignores`` it takes them and does not look."""

    def __init__(self, ignores=False):
        super().__init__()
        mx.random.seed(0)
        self.embedding = nn.Embedding(64, 16)
        self.attention = nn.MultiHeadAttention(16, 2)
        self.dropout = nn.Dropout(0.5)
        self.ignores = ignores

    def __call__(self, tokens, segments=None):
        x = self.embedding(tokens)
        mask = mx.tril(mx.ones((x.shape[1], x.shape[1]), mx.bool_))
        if segments is not None and not self.ignores:
            mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
        x = x + self.attention(x, x, x, mx.where(mask, 0.0, -1e9))
        return self.embedding.as_linear(self.dropout(x))
