"""Loss, perplexity and tokens of a language model, with or without adapters."""

from __future__ import annotations

import argparse
import json

from mlx_fit.causal_lm import CausalLM
from mlx_fit.cli.finetune_settings import MODEL_SETTINGS, TEXT_SETTINGS
from mlx_fit.cli.language_models import load_adapted
from mlx_fit.cli.settings import Setting, add_flags, checking_usage, resolve
from mlx_fit.cli.text_data import check_data, require_part
from mlx_fit.cli.training import choose_chunk, held_out_batches
from mlx_fit.errors import ConfigurationError
from mlx_fit.trainer import Trainer

SETTINGS = (
    *MODEL_SETTINGS,
    *TEXT_SETTINGS,
    Setting("adapter_path", str, None, "folder with adapters, of mlx-lm or PEFT"),
    Setting("split", str, "test", "of a folder", choices=("train", "valid", "test")),
    Setting("batches", int, None, "at most so many", least=1),
    Setting("chunk_size", int, None, "tokens whose logits are in memory; 0: all", least=0),
    Setting("json", bool, False, "print one line of JSON"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlx-fit evaluate``."""
    add_flags(parser, SETTINGS)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print."""
    with checking_usage():
        settings, _ = resolve(arguments, SETTINGS, {}, "")
        for required in ("model", "data"):
            if getattr(settings, required) is None:
                raise ConfigurationError(f"--{required} is missing.")
    check_data(settings.data)
    loaded = load_adapted(settings)
    rows = require_part(settings, loaded.tokenizer, settings.split)
    objective = CausalLM(chunk_size=choose_chunk(loaded.model, settings.chunk_size))
    trainer = Trainer(loaded.model, objective=objective)
    found = trainer.evaluate(
        held_out_batches(rows, loaded.model, settings), steps=settings.batches, verbose=0
    )
    if settings.json:
        print(json.dumps({key: found[key] for key in ("loss", "perplexity", "num_tokens")}))
        return 0
    print(
        f"{rows.name}: loss {found['loss']:.4f}, perplexity {found['perplexity']:.3f}, "
        f"accuracy {found['accuracy']:.4f} over {found['num_tokens']:,.0f} target tokens of "
        f"{len(rows):,} rows"
    )
    return 0
