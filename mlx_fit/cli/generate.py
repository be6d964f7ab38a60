"""Continue a prompt with a language model, with or without adapters."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import mlx.core as mx

from mlx_fit.cli.finetune_settings import MODEL_SETTINGS
from mlx_fit.cli.language_models import import_mlx_lm, load_adapted
from mlx_fit.cli.settings import Setting, add_flags, checking_usage, resolve
from mlx_fit.errors import ConfigurationError

SETTINGS = (
    *MODEL_SETTINGS,
    Setting("adapter_path", str, None, "folder with adapters, of mlx-lm or PEFT"),
    Setting("prompt", str, None, "what to continue; - reads standard input"),
    Setting("system_prompt", str, None, "a system turn before it"),
    Setting("chat_template", bool, True, "make a chat of it where the tokenizer has a template"),
    Setting("max_tokens", int, 256, "at most so many", least=1),
    Setting("temperature", float, 0.0, "0 takes the likeliest token", least=0.0),
    Setting("top_p", float, 1.0, "share of the probability to draw from", least=0.0),
    Setting("seed", int, 0, "of the draws", least=0),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mlx-fit generate``."""
    add_flags(parser, SETTINGS)


def run(arguments: argparse.Namespace) -> int:
    """Generate; the text is printed as it comes."""
    with checking_usage():
        settings, _ = resolve(arguments, SETTINGS, {}, "")
        for required in ("model", "prompt"):
            if getattr(settings, required) is None:
                raise ConfigurationError(f"--{required} is missing.")
    loaded = load_adapted(settings)
    mlx_lm = import_mlx_lm()
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(settings.seed)
    sampler = make_sampler(settings.temperature, top_p=settings.top_p)
    for part in mlx_lm.stream_generate(
        loaded.model,
        loaded.tokenizer,
        _prompt(settings, loaded.tokenizer),
        max_tokens=settings.max_tokens,
        sampler=sampler,
    ):
        print(part.text, end="", flush=True)
    print()
    return 0


def _prompt(settings: argparse.Namespace, tokenizer: Any) -> Any:
    """Text, or the tokens of a chat."""
    text = sys.stdin.read() if settings.prompt == "-" else settings.prompt
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if not settings.chat_template or not has_template:
        if settings.system_prompt is not None:
            raise ConfigurationError("--system-prompt needs a tokenizer with a chat template.")
        return text
    messages = [{"role": "user", "content": text}]
    if settings.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": settings.system_prompt})
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, tokenize=True
    )
