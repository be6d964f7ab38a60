"""Chat templates in the style of five families, and a tokenizer trained on Python's own sources."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import textwrap

SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[INST]"),
    *("[/INST]", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<think>", "</think>"),
]

CHATML = """
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' -%}
{% generation %}{{- m.content + '<|im_end|>' -}}{% endgeneration %}
{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

LLAMA = """
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' -}}
{%- if m.role == 'assistant' -%}
{% generation %}{{- m.content | trim + '<|eot_id|>' -}}{% endgeneration %}
{%- else -%}{{- m.content | trim + '<|eot_id|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""

MISTRAL = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '[INST] ' + m.content + ' [/INST]' -}}
{%- elif m.role == 'assistant' -%}
{% generation %}{{- ' ' + m.content + eos_token -}}{% endgeneration %}
{%- else -%}{{- raise_exception('only user and assistant roles') -}}{%- endif -%}
{%- endfor -%}
"""

GEMMA = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' -}}
{%- if m.role == 'assistant' -%}
{% generation %}{{- m.content | trim + '<end_of_turn>' -}}{% endgeneration %}
{%- else -%}{{- m.content | trim + '<end_of_turn>' -}}{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""

# Drops the thoughts of all answers but the last.
QWEN = """
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' -%}
{%- set said = m.content if loop.last else m.content.split('</think>')[-1].lstrip('\n') -%}
{% generation %}{{- said + '<|im_end|>' -}}{% endgeneration %}
{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "gemma": GEMMA, "qwen": QWEN}
END_OF_TURN = {
    "chatml": "<|im_end|>",
    "llama": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "qwen": "<|im_end|>",
}


def unmarked(template):
    """The template without its generation markers."""
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@functools.cache
def backend():
    """A byte-level BPE of 600 tokens that adds a BOS, as text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = [inspect.getsource(module) for module in (argparse, json, textwrap)]
    tokenizer.train_from_iterator(sources, trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return tokenizer.to_str()


def tokenizer_with(template=None, pad_token="</s>"):
    """The BPE in transformers' clothes; padding is the EOS unless told otherwise."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad_token,
    )
    tokenizer.chat_template = template
    return tokenizer


class Bytes:
    """The smallest tokenizer: a token per byte, 256 the BOS, 257 the EOS and end of a turn."""

    bos_token_id = 256
    eos_token_id = 257

    def __init__(self):
        self.calls = 0

    def encode(self, text, add_special_tokens=True):
        self.calls += 1
        return [256] * add_special_tokens + list(text.encode())

    def decode(self, ids):
        return "".join({256: "<s>", 257: "</s>"}.get(i) or chr(i) for i in ids)

    def apply_chat_template(self, messages, add_generation_prompt=False):
        ids = [256]
        for message in messages:
            ids += list(f"{message['role']}:".encode())
            ids += [*message["content"].encode(), 257]
        return ids + list(b"assistant:") * add_generation_prompt
