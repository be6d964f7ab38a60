"""Tiny models of mlx-lm's own classes as Hugging Face folders, with a tokenizer and rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.mixtral as mixtral
from llama import CONFIG, make_llama, save_llama
from mlx.utils import tree_flatten

import mlx_fit
from mlx_fit.cli import main

TEMPLATE = (
    "{%- for m in messages -%}{{- '<' + m.role + '>' + m.content + '</s>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"
)
WORDS = ["red", "blue", "green", "one", "two", "three", "cat", "dog", "sun", "moon"]
MIXTRAL = {
    **{k: v for k, v in CONFIG.items() if k not in ("head_dim", "attention_bias")},
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "rope_traditional": False,
}


def add_tokenizer(folder):
    """A byte-level BPE trained on the rows' words; 128 ids at most."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<s>", "</s>", "<unk>", "<user>", "<assistant>", "<system>"],
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "what is the next word after ?"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def llama_folder(folder, **config):
    """A Llama of three blocks."""
    save_llama(make_llama(**config), folder)
    add_tokenizer(folder)
    return folder


def mixtral_folder(folder):
    """A mixture of four experts in two blocks."""
    mx.random.seed(0)
    model = mixtral.Model(mixtral.ModelArgs.from_dict(MIXTRAL))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    add_tokenizer(folder)
    return folder


def rows(count, start=0):
    """Questions whose answer is the next word."""
    found = []
    for index in range(start, start + count):
        word, after = WORDS[index % 10], WORDS[(index + 1) % 10]
        extra = " ".join(WORDS[: index % 4])
        found.append({"prompt": f"what is the next word after {word} ? {extra}"})
        found[-1]["completion"] = f" {after} {extra}"
    return found


def write_rows(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def data_folder(folder, train=24, valid=8):
    """``train.jsonl``, ``valid.jsonl`` and ``test.jsonl``."""
    write_rows(folder / "train.jsonl", rows(train))
    write_rows(folder / "valid.jsonl", rows(valid, 3))
    write_rows(folder / "test.jsonl", rows(6, 5))
    return folder


def command(*arguments):
    """``mlx-fit`` with arguments, for a real process."""
    return [sys.executable, "-m", "mlx_fit.cli", *map(str, arguments)]


def environment(**more):
    root = str(Path(mlx_fit.__file__).parents[1])
    return os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"} | more


def run_process(*arguments, **more):
    """The finished process."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(**more), timeout=300
    )


def tune(place, adapters, *flags, model="model", data="data", steps=3):
    """Run ``mlx-fit finetune`` on folders in ``place``; its exit status."""
    options = ("--max-steps", steps, "--no-plan", "--learning-rate", 0.01)
    paths = ("--model", place / model, "--data", place / data, "--adapter-path", adapters)
    return main(["finetune", *map(str, (*paths, *options, *flags))])
