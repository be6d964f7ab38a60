"""What is asked of tokenizers of several libraries, and of odd ones."""

from __future__ import annotations

import numpy as np
import pytest
from chat_templates import CHATML, Bytes, backend, tokenizer_with

from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.text import TextDataset
from mlx_fit.text.tokenizer import Tokenizer


def tokenizers_tokenizer():
    from tokenizers import Tokenizer as Rust

    return Rust.from_str(backend())


def test_a_tokenizer_of_tokenizers_works_without_an_eos():
    rust = tokenizers_tokenizer()
    ((tokens, _),) = TextDataset(["import os"], rust)
    assert tokens.tolist() == rust.encode("import os").ids
    assert Tokenizer(rust).encode_plain("import os") == rust.encode("import os").ids[1:]


@pytest.mark.parametrize("wrap", [list, tuple, np.array, lambda ids: {"input_ids": [ids]}])
def test_ids_may_come_in_any_container(wrap):
    class Wrapped(Bytes):
        def encode(self, text, add_special_tokens=True):
            return wrap(super().encode(text, add_special_tokens))

    ((tokens, _),) = TextDataset(["ab"], Wrapped())
    assert tokens.tolist() == [256, 97, 98, 257]


class Ends(Bytes):
    """Adds both ends to every text, and has no add_special_tokens."""

    bos_token, eos_token = "<s>", "</s>"

    def encode(self, text):
        inner = text.replace("<s>", "\x01").replace("</s>", "\x02").encode()
        return [256, *[{1: 256, 2: 257}.get(byte, byte) for byte in inner], 257]


@pytest.mark.parametrize(
    ("text", "plain"),
    [("a", [97]), ("<s>a", [256, 97]), ("a</s>", [97, 257]), ("", []), ("<s></s>", [256, 257])],
)
def test_what_a_tokenizer_adds_goes_and_what_a_text_holds_stays(text, plain):
    assert Tokenizer(Ends()).encode_plain(text) == plain


def test_a_document_has_one_bos_and_one_eos_whatever_the_tokenizer_adds():
    for text in ("a", "<s>a", "a</s>", "<s>a</s>"):
        assert TextDataset([text], Ends())[0][0].tolist() == [256, 97, 257]
    row = {"prompt": "a", "completion": "b"}
    tokens, mask = TextDataset([row], Ends())[0]
    assert (tokens.tolist(), mask.tolist()) == ([256, 97, 98, 257], [0, 0, 1, 1])


def test_the_first_of_several_eos_ids_ends_a_document():
    class Several(Bytes):
        eos_token_id = (7, 8)

    class Set(Bytes):
        eos_token_id = None
        eos_token_ids = frozenset({9})

    assert [TextDataset(["a"], kind())[0][0][-1] for kind in (Several, Set)] == [7, 9]


@pytest.mark.parametrize("ids", [[0.5], ["a"], [None], [-1], [2**31]])
def test_ids_that_are_none_are_refused(ids):
    class Broken(Bytes):
        def encode(self, text, add_special_tokens=True):
            return ids

    with pytest.raises(
        DataError, match=r"row 0: the tokenizer refused the row: .*returned"
    ) as caught:
        TextDataset(["a"], Broken())
    assert isinstance(caught.value.__cause__, ConfigurationError)


def test_templates_by_name():
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "tools" + CHATML}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns}, {"messages": turns, "tools": [{"name": "f"}]}]
    for (tokens, mask), start in zip(
        TextDataset(rows, tokenizer), ("<|im_start|>", "tools"), strict=True
    ):
        assert tokenizer.decode(tokens).startswith(start)
        assert tokenizer.decode(tokens[mask == 1]) == "b<|im_end|>"


def test_markers_that_a_tokenizer_in_python_cannot_follow_are_left_alone():
    from transformers import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        vocab_size = 256

        def get_vocab(self):
            return {chr(i): i for i in range(256)} | self.added_tokens_encoder

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token)

        def _convert_id_to_token(self, index):
            return chr(index)

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

    tokenizer = Letters(extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    ((tokens, mask),) = TextDataset([{"messages": turns}], tokenizer)
    assert tokenizer.decode(tokens[mask == 1]) == "b c<|im_end|>"
