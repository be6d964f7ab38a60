"""Tokens of an example, and which of them are targets.

In a chat the targets are found from the template's generation markers, or by rendering the turns
before an answer and comparing: those tokens must be the first of the whole. Where neither holds the
row is refused, because a mask that is shifted by a token trains without any sign of it.

Imports layer 2: text.formats, text.messages, text.rows, text.tokenizer.
"""

from __future__ import annotations

import itertools
from typing import Any

from mlx_fit.text.formats import Completion, Document, Example
from mlx_fit.text.messages import CALLS, Chat
from mlx_fit.text.rows import Place
from mlx_fit.text.tokenizer import Tokenizer

__all__ = ["TRAIN_ON", "tokens_and_mask"]

TRAIN_ON = ("completions", "last", "all")

Masked = tuple[list[int], list[int]]


def tokens_and_mask(example: Example, tokenizer: Tokenizer, train_on: str, place: Place) -> Masked:
    """Tokens, and for each 1 if it is a target.

    A first token is never a target. Text and completions end with an EOS where the tokenizer has
    one; a chat ends as its template does.

    Args:
        example: from :mod:`mlx_fit.text.formats`.
        tokenizer: of the model.
        train_on: ``"completions"``: what an assistant says, with its end-of-turn token, or the
            completion with its EOS; ``"last"``: the last of these; ``"all"``: every token.
        place: of the row.

    Raises:
        DataError: the mask cannot be found without doubt, or the tokenizer refused the row.
    """
    try:
        if isinstance(example, Document):
            tokens, mask = _document(example, tokenizer)
        elif isinstance(example, Completion):
            tokens, mask = _completion(example, tokenizer, train_on)
        else:
            tokens, mask = _chat(example, tokenizer, train_on)
    except _Doubt as doubt:
        raise place.error(str(doubt), field=doubt.field) from None
    except RecursionError as error:
        raise place.error(f"is nested too deep for the tokenizer: {error}") from error
    except Exception as error:
        kind = type(error).__name__
        raise place.error(f"the tokenizer refused the row: {kind}: {error}") from error
    if mask:
        mask[0] = 0
    return tokens, mask


class _Doubt(Exception):
    """The mask is not certain; the text says why and what to change.

    Attributes:
        field: the list of messages.
    """

    def __init__(self, chat: Chat, turn: int, text: str) -> None:
        self.field = chat.field
        super().__init__(f"{chat.turn(turn)}: {text}")


def _document(example: Document, tokenizer: Tokenizer) -> Masked:
    if not example.text:
        return [], []
    tokens = _ended(tokenizer.encode(example.text), tokenizer)
    return tokens, [1] * len(tokens)


def _completion(example: Completion, tokenizer: Tokenizer, train_on: str) -> Masked:
    if not example.completion:  # an EOS alone would teach the model to say nothing
        return [], []
    prompt = tokenizer.encode(example.prompt)
    tokens, start = tokenizer.encode(example.prompt + example.completion), len(prompt)
    if tokens[:start] != prompt:
        tokens, start = _divided(example, tokens, prompt, tokenizer)
    tokens, start = _ended(tokens, tokenizer), 0 if train_on == "all" else start
    return tokens, [0] * start + [1] * (len(tokens) - start)


def _divided(
    example: Completion, whole: list[int], prompt: list[int], tokenizer: Tokenizer
) -> tuple[list[int], int]:
    """Tokens, and how many are the prompt's, where some token spans its end.

    A model that is used gets the prompt by itself, so the parts are encoded by themselves, unless
    that adds a space, as SentencePiece does: then the token that spans the end is a target.
    """
    parts = prompt + tokenizer.encode_plain(example.completion)
    text = tokenizer.decode(whole)
    is_faithful = text is not None and text.endswith(example.prompt + example.completion)
    if not is_faithful or tokenizer.decode(parts) == text:
        return parts, len(prompt)
    pairs = zip(whole, prompt, strict=False)
    return whole, next(i for i, (a, b) in enumerate([*pairs, (0, 1)]) if a != b)


def _ended(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    return tokens if tokenizer.eos is None else [*tokens, tokenizer.eos]


def _chat(chat: Chat, tokenizer: Tokenizer, train_on: str) -> Masked:
    chat = chat._replace(messages=_with_calls(chat, tokenizer))
    if train_on == "all":
        tokens = tokenizer.chat(chat.messages, chat.tools)
        return tokens, [1] * len(tokens)
    turns = [number for number, learned in enumerate(chat.learned) if learned]
    answers = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if train_on == "last":
        turns = [turn for turn in turns if turn == answers[-1]]
    marked = tokenizer.chat_marked(chat.messages, chat.tools)
    if marked is not None:
        tokens, mask = marked
        spans = _whole_turns(tokens, _spans(mask), tokenizer)
        if len(spans) == len(answers):
            wanted = {n: span for n, span in zip(answers, spans, strict=True) if n in turns}
            if not any(
                _begins_early(tokens, n, span, chat, tokenizer) for n, span in wanted.items()
            ):
                return tokens, _mask(len(tokens), list(wanted.values()))
        elif len(spans) > len(answers) and turns == answers:
            return tokens, _mask(len(tokens), spans)
    return _by_prefixes(chat, turns, tokenizer)


def _begins_early(
    tokens: list[int], turn: int, span: tuple[int, int], chat: Chat, tokenizer: Tokenizer
) -> bool:
    """Whether a marked answer begins with a token that holds the end of its prompt, too."""
    # Rendering is slow, and after tokens that were found to end a prompt an answer begins whole.
    ending = tuple(tokens[max(span[0] - 4, 0) : span[0]])
    if ending in tokenizer.prompt_endings:
        return False
    before = tokenizer.chat(chat.messages[:turn], chat.tools, prompt=True)
    if _starts(tokens, before):
        if len(before) == span[0]:
            tokenizer.prompt_endings.add(ending)
        return False
    prompt = tokenizer.chat_text(chat.messages[:turn], chat.tools, prompt=True)
    text = tokenizer.chat_text(chat.messages, chat.tools)
    unlearned = tokenizer.decode(tokens[: span[0]])
    if prompt is None or text is None or unlearned is None or not text.startswith(prompt):
        return False
    return unlearned != prompt and prompt.startswith(unlearned)


def _with_calls(chat: Chat, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The messages as the tokenizer's template knows them.

    ShareGPT's function calls become tool calls where the template has these, else stay text.
    """
    template = tokenizer.template
    knows_calls = template is None or "tool_calls" in template
    adapted = []
    for number, message in enumerate(chat.messages):
        if "tool_calls" in message and not knows_calls:
            raise _Doubt(
                chat,
                number,
                "tool_calls, which the chat template leaves out. Use a template that renders them.",
            )
        if CALLS in message:
            calls, message = message[CALLS], {k: v for k, v in message.items() if k != CALLS}
            if template is not None and knows_calls:
                message |= {"content": "", "tool_calls": calls}
        adapted.append(message)
    return adapted


def _spans(mask: list[int]) -> list[tuple[int, int]]:
    """Where runs of ones begin and end."""
    edges = [
        i for i in range(len(mask) + 1) if (mask[i - 1 : i] or [0]) != (mask[i : i + 1] or [0])
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _mask(length: int, spans: list[tuple[int, int]]) -> list[int]:
    mask = [0] * length
    for start, stop in spans:
        mask[start:stop] = [1] * (stop - start)
    return mask


def _whole_turns(
    tokens: list[int], spans: list[tuple[int, int]], tokenizer: Tokenizer
) -> list[tuple[int, int]]:
    """Spans with their end-of-turn token, where a template's markers leave it out.

    It is the control token that follows the last answer: without it no model learns to stop.
    """
    if not spans or tokenizer.is_special(tokens[spans[-1][1] - 1]):
        return spans
    end_of_turn = tokens[spans[-1][1]] if spans[-1][1] < len(tokens) else None
    if end_of_turn is None or not tokenizer.is_special(end_of_turn):
        return spans
    return [(start, stop + (tokens[stop : stop + 1] == [end_of_turn])) for start, stop in spans]


# --- by prefixes ----------------------------------------------------------------------------------


def _by_prefixes(chat: Chat, turns: list[int], tokenizer: Tokenizer) -> Masked:
    messages, tools = chat.messages, chat.tools
    tokens = tokenizer.chat(messages, tools)
    spans = []
    for turn in turns:
        before = tokenizer.chat(messages[:turn], tools, prompt=True)
        after = tokens
        if turn + 1 < len(messages):
            after = tokenizer.chat(messages[: turn + 1], tools)
        if not (_starts(tokens, before) and _starts(tokens, after) and len(before) <= len(after)):
            return _by_texts(chat, turns, tokenizer)
        if not tokenizer.adds_prompt(messages[:turn], tools, before):
            content = messages[turn]["content"].strip()
            answer = tokenizer.decode(tokens[len(before) : len(after)])
            first = tokenizer.encode_plain(content)[:1] if answer is None and content else []
            at_once = (answer or content).lstrip().startswith(content)
            _check_start(chat, turn, at_once and _starts(tokens[len(before) :], first))
        span = (len(before), len(after))
        spans.append(_without_tail(tokens, span, messages[turn], tokenizer))
    return tokens, _mask(len(tokens), spans)


def _starts(tokens: list[int], prefix: list[int]) -> bool:
    return tokens[: len(prefix)] == prefix


def _by_texts(chat: Chat, turns: list[int], tokenizer: Tokenizer) -> Masked:
    """The same, where only the texts are prefixes: a token spans the start or end of an answer.

    Then the parts are encoded by themselves, as they are when the model is used.
    """
    messages, tools = chat.messages, chat.tools
    text = tokenizer.chat_text(messages, tools)
    if text is None:
        raise _not_prefix_preserving(chat, turns[0])
    cuts = [0]
    for turn in turns:
        before = tokenizer.chat_text(messages[:turn], tools, prompt=True) or ""
        after = text
        if turn + 1 < len(messages):
            after = tokenizer.chat_text(messages[: turn + 1], tools) or ""
        if not (text.startswith(before) and text.startswith(after) and len(before) <= len(after)):
            raise _not_prefix_preserving(chat, turn)
        if not tokenizer.adds_prompt(messages[:turn], tools, before):
            content = messages[turn]["content"].strip()
            _check_start(chat, turn, text[len(before) :].lstrip().startswith(content))
        cuts += [len(before), len(after)]
    cuts.append(len(text))
    parts = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
    tokens: list[int] = tokenizer.one_bos(tokenizer.encode_plain(parts[0]))
    spans = []
    for number, part in enumerate(parts[1:]):
        start = len(tokens)
        tokens += tokenizer.encode_plain(part) if part else []
        if number % 2 == 0:
            message = messages[turns[number // 2]]
            spans.append(_without_tail(tokens, (start, len(tokens)), message, tokenizer))
    if tokenizer.decode(tokens) != tokenizer.decode(tokenizer.chat(messages, tools)):
        raise _Doubt(
            chat,
            turns[0],
            "the tokenizer joins an answer with what stands beside it, and encodes them "
            "differently by themselves. Use a chat template that ends turns with control tokens.",
        )
    return tokens, _mask(len(tokens), spans)


def _check_start(chat: Chat, turn: int, at_once: bool) -> None:
    """Check that an answer follows its prompt at once, where a template adds no header to it.

    A template that ignores ``add_generation_prompt`` would have its header learned.
    """
    if not at_once:
        raise _Doubt(
            chat,
            turn,
            "where the answer starts is not known, because the chat template ignores "
            "add_generation_prompt. Let the template use it, or put generation markers "
            "({% generation %}) around what the assistant says.",
        )


def _without_tail(
    tokens: list[int], span: tuple[int, int], message: dict[str, Any], tokenizer: Tokenizer
) -> tuple[int, int]:
    """The span up to its end-of-turn mark, without the whitespace that a template writes after it.

    Where there is no mark, the whitespace is what ends the turn.
    """
    start, stop = span
    end = stop
    while end > start and (tokenizer.decode(tokens[end - 1 : end]) or "x").isspace():
        end -= 1
    if end in (start, stop):
        return span
    content, text = message["content"].strip(), tokenizer.decode(tokens[start:end]) or ""
    has_mark = tokenizer.is_special(tokens[end - 1]) or not text.endswith(content)
    return (start, end) if has_mark else span


def _not_prefix_preserving(chat: Chat, turn: int) -> _Doubt:
    return _Doubt(
        chat,
        turn,
        "the chat template is not prefix-preserving: it writes the turns up to here otherwise once "
        "more turns follow, so which tokens are the answer cannot be known. Use a template with "
        "generation markers ({% generation %}), train_on='last', or one row for each answer.",
    )
