"""TextDataset: token sequences and target masks from rows of text.

Imports layer 2: text.fields, text.formats, text.masks, text.messages, text.report, text.rows,
text.sources, text.tally, text.tokenizer, text.tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fit.checks import natural, path_of
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.text.fields import describe
from mlx_fit.text.formats import FIELDS, FORMATS, Completion, Example, recognised
from mlx_fit.text.masks import TRAIN_ON, tokens_and_mask
from mlx_fit.text.messages import Chat
from mlx_fit.text.report import TextReport, make_report
from mlx_fit.text.rows import Place, Rows
from mlx_fit.text.sources import open_rows
from mlx_fit.text.tally import Tally
from mlx_fit.text.tokenizer import Tokenizer
from mlx_fit.text.tokens import TokenStore, TokenWriter, load

__all__ = ["TextDataset"]

_VERSION = 1  # of the tokens that the same arguments give: caches of another one are void
_LOOKED_AT = 100  # rows that may tell the format
_TRUNCATION = ("truncate", "drop", "error")


class TextDataset:
    """Rows of text as token sequences, each with a mask of its targets.

    All rows are read, checked and tokenised at construction; the tokens are kept flat, as int32. No
    row is dropped, cut or skipped without being counted: see :meth:`report`.

    Formats, recognised by their fields:

    - ``"chat"``: ``{"messages": [{"role": "user", "content": ...}, ...]}``, OpenAI's, with
      ``tools`` and ``tool_calls``; an assistant turn with ``"weight": 0`` is no target, unless all
      tokens are (``train_on="all"``).
    - ``"sharegpt"``: ``{"conversations": [{"from": "human", "value": ...}, ...]}``, with ``system``
      and ``tools``.
    - ``"alpaca"``: ``{"instruction": ..., "input": ..., "output": ...}``, in Stanford's prompt.
    - ``"completions"``: ``{"prompt": ..., "completion": ...}``, one after the other as they are.
    - ``"text"``: ``{"text": ...}``, strings, or the lines of a ``.txt`` file: every token is a
      target, whatever ``train_on``.

    Chats are written by the tokenizer's chat template. Their targets come from its generation
    markers, or from rendering the turns before an answer, where that is checked to be a prefix of
    the whole; otherwise the row is an error. Text, completions and Alpaca rows end with the
    tokenizer's EOS; what was cut does not. There is one BOS, if the tokenizer or the template
    writes any.

    Args:
        source: path of a ``.jsonl``, ``.txt``, ``.parquet`` or ``.arrow`` file, or a list (or
            data set) of rows.
        tokenizer: has ``encode(text)``, and for chats ``apply_chat_template(messages)``: one of
            transformers, mlx-lm or tokenizers, or your own.
        format: one of the above, or ``"auto"``: the first one that a row among the first 100 has
            the fields of. Rows of another format are errors.
        train_on: ``"completions"``: every assistant turn with its end-of-turn token; ``"last"``:
            the last one; ``"all"``: every token.
        max_length: tokens of a row at most, None for no limit.
        truncation: what happens to longer rows: ``"truncate"`` keeps their beginning, ``"drop"``
            leaves them out, ``"error"`` raises.
        on_error: ``"raise"`` at the first bad row, or ``"skip"`` and count them.
        fields: names of fields in the rows, where they differ: ``{"completion": "answer"}``.
        use_chat_template: make chats of a user and an assistant turn of Alpaca and completion rows,
            in the tokenizer's template.
        template_options: further keywords for ``apply_chat_template``, such as ``enable_thinking``.
        cache_dir: folder for the tokens. They are written once for the same rows, tokenizer and
            arguments, and memory-mapped from then on. None keeps them in memory.

    Attributes:
        format: the format of the rows.
        lengths: tokens of each row, int64 of shape ``(rows,)``.
        store: all rows' tokens and masks as flat arrays.

    Raises:
        DataError: a bad row, with ``path``, ``line``, ``column``, ``field`` and ``index``; no rows
            at all; a format that cannot be recognised.
        ConfigurationError: an argument is wrong, or chats meet a tokenizer without a template.

    Example:
        >>> from mlx_fit.text import TextDataset
        >>> class Bytes:
        ...     eos_token_id = 0
        ...     def encode(self, text):
        ...         return list(text.encode())
        >>> dataset = TextDataset([{"prompt": "1+1=", "completion": "2"}], Bytes())
        >>> tokens, mask = dataset[0]
        >>> tokens.tolist(), mask.tolist()
        ([49, 43, 49, 61, 50, 0], [0, 0, 0, 0, 1, 1])
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any,
        format: str = "auto",
        train_on: str = "completions",
        max_length: int | None = None,
        truncation: str = "truncate",
        on_error: str = "raise",
        *,
        fields: Mapping[str, str] | None = None,
        use_chat_template: bool = False,
        template_options: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        _check("format", format, ("auto", *FORMATS))
        _check("train_on", train_on, TRAIN_ON)
        _check("truncation", truncation, _TRUNCATION)
        _check("on_error", on_error, ("raise", "skip"))
        _check("use_chat_template", use_chat_template, (True, False))
        if max_length is not None:
            natural("max_length", max_length, 2)
        encoder = Tokenizer(tokenizer, template_options)
        rows = open_rows(source)
        if not len(rows):
            raise DataError(f"There are no rows in {rows.name}: nothing to train on.")
        self.name = rows.name
        self._unit = rows.unit
        self._renamed = _checked_fields(fields)
        self._use_chat_template = use_chat_template
        self._limit = (max_length, truncation)
        self.format = self._recognise(rows) if format == "auto" else format
        if self.format in ("chat", "sharegpt") or (use_chat_template and self.format != "text"):
            encoder.check_chat()
        folder = None
        if cache_dir is not None:
            options = (self.format, train_on, *self._limit, on_error, use_chat_template)
            key = json.dumps([_VERSION, options, self._renamed, type(rows).__name__, rows.digest()])
            folder = path_of("cache_dir", cache_dir) / _digest(key + encoder.fingerprint())
        cached = load(folder) if folder else None
        self.store = cached or self._read(rows, encoder, train_on, on_error, folder)
        self._tallies = {
            name: Tally(**facts) for name, facts in self.store.facts["tallies"].items()
        }
        self.lengths = np.diff(self.store.offsets)
        self._log()

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Row ``index``: tokens, int32, and mask, uint8, 1 at targets, both ``(tokens,)``."""
        return self.store[range(len(self))[index]]  # counts negative indices, raises IndexError

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return map(self.store.__getitem__, range(len(self)))

    def __repr__(self) -> str:
        return f"TextDataset({self.name}, {len(self)} rows, {len(self.store.tokens)} tokens)"

    def row_name(self, index: int) -> str:
        """What row ``index`` is called where it was read: ``"train.jsonl, line 17"``."""
        number = int(self.store.numbers[index])
        return f"{self.name}, line {number}" if self._unit == "line" else f"row {number}"

    def report(self, batch_size: int = 32, max_shapes: int = 32) -> TextReport:
        """What was read, kept and lost, and what padding costs.

        Args:
            batch_size, max_shapes: of the batches whose padding is told.

        Raises:
            ConfigurationError: they are not positive integers.
        """
        return make_report(
            name=self.name,
            unit=self._unit,
            store=self.store,
            tallies=self._tallies,
            batch_size=natural("batch_size", batch_size, 1),
            max_shapes=natural("max_shapes", max_shapes, 1),
        )

    # --- reading ---------------------------------------------------------------------------------

    def _recognise(self, rows: Rows) -> str:
        for index in range(min(len(rows), _LOOKED_AT)):
            try:
                row = rows[index]
            except DataError:
                continue  # it is told when all rows are read
            if isinstance(row, Mapping) and (name := recognised(self._rename(row))):
                return name
        first = rows[0]
        if not isinstance(first, Mapping):
            raise rows.place(0).error(_not_an_object(first))
        have = ", ".join(map(str, first)) or "nothing"
        known = "; ".join(f"{name}: {', '.join(needs)}" for name, needs in FIELDS.items())
        raise rows.place(0).error(
            f"the format cannot be recognised from the fields (have: {have}). Known are {known}. "
            "Pass format=, or fields= where only the names differ."
        )

    def _read(
        self,
        rows: Rows,
        tokenizer: Tokenizer,
        train_on: str,
        on_error: str,
        folder: Path | None,
    ) -> TokenStore:
        tallies = {name: Tally() for name in ("skipped", "cut", "too_long", "nothing_to_learn")}
        writer = TokenWriter(folder)
        try:
            for index in range(len(rows)):
                place = rows.place(index)
                try:
                    example = self._example(rows[index], place)
                    found = tokens_and_mask(example, tokenizer, train_on, place)
                    kept = self._fitted(*found, place, tallies)
                except DataError as error:
                    if on_error == "raise":
                        raise
                    tallies["skipped"].add(place.number, message=str(error))
                    continue
                if kept is not None:
                    writer.add(*kept, place.number)
            facts = {"num_rows": len(rows), "num_blank": rows.num_blank}
            kept_tallies = {name: tally.as_dict() for name, tally in tallies.items()}
            return writer.finish({**facts, "tallies": kept_tallies})
        except BaseException:
            writer.discard()
            raise

    def _example(self, row: Any, place: Place) -> Example:
        if not isinstance(row, Mapping):
            raise place.error(_not_an_object(row))
        example = FORMATS[self.format](self._rename(row), place)
        if self._use_chat_template and isinstance(example, Completion):
            turns = (("user", example.prompt), ("assistant", example.completion))
            messages = [{"role": role, "content": content} for role, content in turns]
            return Chat(messages, [False, True], None)
        return example

    def _rename(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self._renamed:
            return row
        taken = set(self._renamed.values())
        kept = {name: value for name, value in row.items() if name not in taken}
        renamed = {ours: row[theirs] for ours, theirs in self._renamed.items() if theirs in row}
        return {**kept, **renamed}

    def _fitted(
        self, tokens: list[int], mask: list[int], place: Place, tallies: dict[str, Tally]
    ) -> tuple[list[int], list[int]] | None:
        """Tokens and mask within ``max_length``; None, and counted, where nothing is left."""
        max_length, truncation = self._limit
        length = len(tokens)
        if max_length is not None and length > max_length:
            if truncation == "error":
                raise place.error(
                    f"{length} tokens, more than max_length={max_length}. Raise max_length, or set "
                    "truncation='truncate' or 'drop'."
                )
            if truncation == "drop":
                tallies["too_long"].add(place.number, tokens=length)
                return None
            tokens, mask = tokens[:max_length], mask[:max_length]
        if not any(mask):
            tallies["nothing_to_learn"].add(place.number, tokens=length)
            return None
        if length > len(tokens):
            tallies["cut"].add(place.number, tokens=length - len(tokens))
        return tokens, mask

    def _log(self) -> None:
        lost = [tally for tally in self._tallies.values() if tally.count]
        if lost:
            import logging  # slow to import, and seldom needed

            lines = [f"{self.name}: {len(self)} of {self.store.facts['num_rows']} rows"]
            lines += [_loss(name, t, self._unit) for name, t in self._tallies.items() if t.count]
            logging.getLogger("mlx_fit.text").warning("; ".join(lines))


def _loss(name: str, tally: Tally, unit: str) -> str:
    return f"{name.replace('_', ' ')}: {tally.count} ({unit} {tally.listed()})"


def _not_an_object(row: Any) -> str:
    return f"found {describe(row)}; expected an object with named fields."


def _check(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if not any(value is each or (isinstance(value, str) and value == each) for each in allowed):
        raise ConfigurationError(
            f"{name}={value!r}; expected one of {', '.join(map(repr, allowed))}."
        )


def _checked_fields(fields: Mapping[str, str] | None) -> dict[str, str]:
    known = {"messages", "conversations", "tools", "system", "input"}
    known |= {field for needed in FIELDS.values() for field in needed}
    for ours, theirs in (fields or {}).items():
        if ours not in known or not isinstance(theirs, str):
            raise ConfigurationError(
                f"fields={{{ours!r}: {theirs!r}}}; expected the name of a known field "
                f"({', '.join(sorted(known))}) and what it is called in the rows."
            )
    return dict(fields or {})


def _digest(text: str) -> str:
    from hashlib import blake2b  # slow to import: it loads OpenSSL

    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
