"""A user's tokenizer, of whatever library, behind the few calls that are needed here.

Anything with ``encode`` will do, and for chats ``apply_chat_template``: transformers, mlx-lm's
wrapper, ``tokenizers``, or a class of one's own. Only keywords that it takes are passed.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mlx_fit.errors import ConfigurationError

__all__ = ["Tokenizer"]

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CHAT_KEYWORDS = ("tokenize", "add_generation_prompt", "tools")
_LARGEST = np.iinfo(np.int32).max


class Tokenizer:
    """The calls that this package makes of a tokenizer.

    Args:
        tokenizer: the user's.
        template_options: further keywords for its ``apply_chat_template``.

    Attributes:
        bos, eos: ids of the tokens that begin and end a document, None where it has none.
        template: its chat template where that is a text, else None.
        prompt_endings: last tokens of prompts that were seen to end between two tokens.

    Raises:
        ConfigurationError: it has no ``encode``.
    """

    def __init__(self, tokenizer: Any, template_options: Mapping[str, Any] | None = None) -> None:
        is_object = not isinstance(tokenizer, str | bytes | type)  # "gpt2" has an encode, too
        if not is_object or not callable(getattr(tokenizer, "encode", None)):
            raise ConfigurationError(
                f"tokenizer is {tokenizer!r:.60}; expected an object with encode(text), such as a "
                "tokenizer of transformers, tokenizers or mlx-lm."
            )
        self._tokenizer = tokenizer
        self._options = dict(template_options or {})
        self._plain = {"add_special_tokens": False}
        self._has_plain = _takes(tokenizer.encode, "add_special_tokens")
        self._decode = getattr(tokenizer, "decode", None)
        self._marking = _marking(tokenizer)
        chat = getattr(tokenizer, "apply_chat_template", None)
        self.prompt_endings: set[tuple[int, ...]] = set()
        self._adds_prompt = False  # whether add_generation_prompt was seen to have an effect
        self._chat_takes = {key for key in _CHAT_KEYWORDS if chat and _takes(chat, key)}
        self.bos = _single(getattr(tokenizer, "bos_token_id", None))
        self.eos = _single(getattr(tokenizer, "eos_token_id", None))
        self._bos_text = str(getattr(tokenizer, "bos_token", None) or "\0")
        self._eos_text = str(getattr(tokenizer, "eos_token", None) or "\0")
        ends = getattr(tokenizer, "eos_token_ids", None) or ()
        ends = {ends} if isinstance(ends, int) else set(ends)
        if self.eos is None and len(ends) == 1:
            self.eos = next(iter(ends))
        self._special = ends | {self.bos, self.eos} - {None}
        self._special.update(getattr(tokenizer, "all_special_ids", None) or ())
        self._special.update(getattr(tokenizer, "added_tokens_decoder", None) or ())
        template = getattr(tokenizer, "chat_template", None)
        self.template = template if isinstance(template, str) else None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text that begins a document: with one BOS if the tokenizer adds any, no EOS.

        An EOS is for whoever knows where the document ends.
        """
        ids = self._ids(self._tokenizer.encode(text))
        while ids and ids[-1] == self.eos is not None:
            ids.pop()
        return self.one_bos(ids)

    def encode_plain(self, text: str) -> list[int]:
        """Tokens of a text in the midst of a document: without BOS and EOS."""
        if self._has_plain:
            return self._ids(self._tokenizer.encode(text, **self._plain))
        ids = self._ids(self._tokenizer.encode(text))
        # What the tokenizer added goes; a BOS or EOS that the text itself holds stays.
        if _added(ids[:2], self.bos, text.startswith(self._bos_text)):
            ids = ids[1:]
        return ids[:-1] if _added(ids[:-3:-1], self.eos, text.endswith(self._eos_text)) else ids

    def one_bos(self, ids: list[int]) -> list[int]:
        """``ids`` with a single BOS where several begin them."""
        if self.bos is None:
            return ids
        start = 0
        while ids[start : start + 2] == [self.bos, self.bos]:
            start += 1
        return ids[start:]

    def decode(self, ids: list[int]) -> str | None:
        """The text of ``ids``, or None where the tokenizer cannot say."""
        return self._decode(ids) if callable(self._decode) else None

    def is_special(self, token: int) -> bool:
        """Whether it is a control token, which no ordinary text gives."""
        return token in self._special

    def check_chat(self) -> None:
        """Whether chats can be rendered.

        Raises:
            ConfigurationError: there is no chat template.
        """
        tokenizer = self._tokenizer
        if not callable(getattr(tokenizer, "apply_chat_template", None)):
            missing = "has no apply_chat_template"
        elif (
            getattr(tokenizer, "chat_template", "") is None
            and getattr(tokenizer, "has_chat_template", False) is not True  # mlx-lm's own renderers
        ):
            missing = "has no chat_template"
        else:
            return
        raise ConfigurationError(
            f"The rows are chats, but tokenizer (a {type(tokenizer).__name__}) {missing}. Load the "
            "tokenizer of an instruction-tuned model, or set tokenizer.chat_template."
        )

    def chat(
        self, messages: list[Any], tools: list[Any] | None, *, prompt: bool = False
    ) -> list[int]:
        """Tokens of a conversation; ``prompt`` adds what comes before the next answer."""
        rendered = self._render(messages, tools, prompt, {})
        if isinstance(rendered, str):
            return self.one_bos(self.encode_plain(rendered))
        return self.one_bos(self._ids(rendered))

    def adds_prompt(
        self, messages: list[Any], tools: list[Any] | None, with_prompt: list[int] | str
    ) -> bool:
        """Whether the template adds something before an answer: what it rendered with ``prompt``
        differs from what it renders without. A template does so always or never."""
        if not self._adds_prompt:
            render: Any = self.chat_text if isinstance(with_prompt, str) else self.chat
            self._adds_prompt = render(messages, tools) != with_prompt
        return self._adds_prompt

    def chat_text(
        self, messages: list[Any], tools: list[Any] | None, *, prompt: bool = False
    ) -> str | None:
        """The text of a conversation, or None where the tokenizer gives tokens alone."""
        if "tokenize" not in self._chat_takes:
            return None
        rendered = self._render(messages, tools, prompt, {"tokenize": False})
        return rendered if isinstance(rendered, str) else None

    def chat_marked(
        self, messages: list[Any], tools: list[Any] | None
    ) -> tuple[list[int], list[int]] | None:
        """Tokens, and 1 where the template's generation markers hold; None without markers."""
        if self._marking is None or not _MARKER.search(self._template_for(tools)):
            return None
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        tools_given = {"tools": tools} if tools else {}
        out = self._marking(messages, **options, **tools_given, **self._options)
        ids = self._ids(out["input_ids"])
        mask = np.asarray(out["assistant_masks"]).reshape(-1).tolist()
        kept = self.one_bos(ids)
        return kept, mask[len(ids) - len(kept) :]

    def fingerprint(self) -> str:
        """Everything that tokens depend on, as text, for the key of a cache.

        Raises:
            ConfigurationError: there is no telling what the tokenizer does.
        """
        inner = getattr(self._tokenizer, "_tokenizer", self._tokenizer)
        for candidate in (self._tokenizer, inner):
            backend = getattr(candidate, "backend_tokenizer", candidate)
            if callable(getattr(backend, "to_str", None)):
                settings = (self.bos, self.eos, sorted(map(str, self._special)), self._options)
                chat = getattr(candidate, "chat_template", None)
                return f"{backend.to_str()}\n{settings!r}\n{chat!r}"
        raise ConfigurationError(
            f"cache_dir needs a tokenizer whose content can be hashed: a fast one of transformers, "
            f"mlx-lm's wrapper of one, or tokenizers.Tokenizer; got a "
            f"{type(self._tokenizer).__name__}. Leave cache_dir out."
        )

    def _render(
        self, messages: list[Any], tools: list[Any] | None, prompt: bool, more: dict[str, Any]
    ) -> Any:
        keywords = {**self._options, **more}
        if prompt and "add_generation_prompt" in self._chat_takes:
            keywords["add_generation_prompt"] = True
        if tools:
            if "tools" not in self._chat_takes:
                raise ConfigurationError(
                    "the row has tools, but the tokenizer's apply_chat_template takes none."
                )
            keywords["tools"] = tools
        return self._tokenizer.apply_chat_template(messages, **keywords)

    def _template_for(self, tools: list[Any] | None) -> str:
        """The text of the template that is used: transformers may keep several by name."""
        template = getattr(self._tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("tool_use" if tools and "tool_use" in template else "default")
        return template if isinstance(template, str) else ""

    def _ids(self, encoded: Any) -> list[int]:
        """Token ids of whatever ``encode`` and ``apply_chat_template`` return."""
        if isinstance(encoded, Mapping):
            encoded = encoded["input_ids"]
        encoded = getattr(encoded, "ids", encoded)  # tokenizers.Encoding
        if hasattr(encoded, "tolist"):
            encoded = encoded.tolist()
        ids = list(encoded)
        if len(ids) == 1 and isinstance(ids[0], list | tuple):
            ids = list(ids[0])
        try:
            ids = [operator.index(token) for token in ids]
        except TypeError as error:
            raise ConfigurationError(
                f"The tokenizer returned {ids[:3]!r:.80}; expected a list of integers."
            ) from error
        if ids and not 0 <= min(ids) <= max(ids) <= _LARGEST:
            raise ConfigurationError(
                f"The tokenizer returned ids from {min(ids)} to {max(ids)}; expected 0 to 2^31 - 1."
            )
        return ids


def _added(outer: list[int], token: int | None, is_in_text: bool) -> bool:
    """Whether the outermost id is ``token``, and more than the text itself holds."""
    return token is not None and outer[: 1 + is_in_text] == [token] * (1 + is_in_text)


def _single(token: Any) -> int | None:
    """An id, or the first of several."""
    if isinstance(token, list | tuple):
        return token[0] if token else None
    return token


def _takes(function: Callable[..., Any], keyword: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built in, without a signature
        return False
    return any(p.name == keyword or p.kind is p.VAR_KEYWORD for p in parameters)


def _marking(tokenizer: Any) -> Callable[..., Any] | None:
    """The ``apply_chat_template`` that can mark what the assistant says, if there is one.

    mlx-lm's wrapper cannot; the transformers tokenizer within it can, if it is a fast one: those in
    Python do not know where in the text their tokens are.
    """
    for candidate in (tokenizer, getattr(tokenizer, "_tokenizer", None)):
        apply = getattr(candidate, "apply_chat_template", None)
        if apply is not None and getattr(candidate, "is_fast", True):
            try:
                if "return_assistant_tokens_mask" in inspect.signature(apply).parameters:
                    return apply
            except (TypeError, ValueError):
                continue
    return None
