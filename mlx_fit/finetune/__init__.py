"""Fine-tuning: what trains, low-rank adapters, and files that mlx-lm and PEFT read.

finetune.apply_lora(model, rank=8, alpha=16)
Trainer(model, optimizer, objective=CausalLM()).fit(batches)
finetune.save_adapters(model, "adapters")
"""

from mlx_fit.finetune.adapters import load_adapters, save_adapters
from mlx_fit.finetune.contexts import checkpoint_layers, neftune
from mlx_fit.finetune.heads import Embedder, InfoNCE, SequenceClassifier, pad_tokens
from mlx_fit.finetune.lora import apply_lora
from mlx_fit.finetune.merging import Adapters, attach, detach, disabled, fuse, merge, unmerge
from mlx_fit.finetune.rates import lora_plus
from mlx_fit.finetune.routers import RouterLoss
from mlx_fit.finetune.select import select
from mlx_fit.finetune.statistics import Statistics, statistics

__all__ = [
    "Adapters",
    "Embedder",
    "InfoNCE",
    "RouterLoss",
    "SequenceClassifier",
    "Statistics",
    "apply_lora",
    "attach",
    "checkpoint_layers",
    "detach",
    "disabled",
    "fuse",
    "load_adapters",
    "lora_plus",
    "merge",
    "neftune",
    "pad_tokens",
    "save_adapters",
    "select",
    "statistics",
    "unmerge",
]
