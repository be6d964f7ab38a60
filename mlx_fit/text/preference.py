"""Pairs of answers to one prompt, the better one told: rows, tokens and batches.

Imports layer 2: text.batches, text.bucket, text.fields, text.formats, text.masks, text.messages,
text.planning, text.rows, text.sources, text.tally, text.tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from mlx_fit.checks import boolean, natural
from mlx_fit.errors import ConfigurationError, DataError
from mlx_fit.text.batches import TokenBatches
from mlx_fit.text.bucket import plan_by_length
from mlx_fit.text.fields import listed, required, string
from mlx_fit.text.formats import Completion, Example
from mlx_fit.text.masks import tokens_and_mask
from mlx_fit.text.messages import Chat, chat_message, check_turns, tool_list, turn_mapping
from mlx_fit.text.planning import choose_grid
from mlx_fit.text.rows import Place
from mlx_fit.text.sources import open_rows
from mlx_fit.text.tally import Tally
from mlx_fit.text.tokenizer import Tokenizer

__all__ = ["PreferenceBatch", "PreferenceBatches", "PreferenceDataset"]

ANSWERS = ("chosen", "rejected")


class PreferenceBatch(NamedTuple):
    """A batch of pairs; the second axis holds the chosen and the rejected answer.

    Attributes:
        tokens: int32 of shape ``(pairs, 2, length)``: prompt and answer, padded with 0.
        targets: int32, the token that follows each one.
        weights: float32, 1 where a target belongs to the answer.
        reference: float32 of shape ``(pairs, 2)``: log-probabilities of the answers under the
            reference model, 0 where they were not computed beforehand.
    """

    tokens: Any
    targets: Any
    weights: Any
    reference: Any


class Pair(NamedTuple):
    """Tokens (int32) and masks (uint8, 1 at the answer's tokens) of both answers."""

    chosen: np.ndarray
    chosen_mask: np.ndarray
    rejected: np.ndarray
    rejected_mask: np.ndarray


class PreferenceDataset:
    """Rows of a prompt with a chosen and a rejected answer, as TRL writes them.

    - ``{"prompt": "...", "chosen": "...", "rejected": "..."}``: the answer follows the prompt as it
      is, and ends with the tokenizer's EOS.
    - The same with lists of messages (``{"role": ..., "content": ...}``), which the tokenizer's
      chat template writes; ``tools`` go to the template.
    - ``chosen`` and ``rejected`` as whole conversations without a ``prompt``: what both begin with
      is the prompt.

    Only the answers are targets.

    Args:
        source: path of a ``.jsonl`` file, or a list (or data set) of rows.
        tokenizer: as for :class:`~mlx_fit.text.TextDataset`.
        max_length: tokens of prompt and answer at most.
        truncation: what happens to a row that is longer: ``"truncate"`` keeps the beginnings,
            ``"drop"`` leaves it out, ``"error"`` raises.
        on_error: ``"raise"`` at the first bad row, or ``"skip"`` and count them.

    Attributes:
        lengths: tokens of the longer answer of each row with its prompt, int64.
        num_read: rows that were read.
        cut, dropped, skipped: tallies of the rows that were cut, left out because nothing of an
            answer remained or they were too long, and bad.

    Raises:
        DataError: a bad row, with its place and field.
        ConfigurationError: an argument is wrong.

    Example:
        >>> from mlx_fit.text import PreferenceDataset
        >>> class Bytes:
        ...     eos_token_id = 0
        ...     def encode(self, text):
        ...         return list(text.encode())
        >>> rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "22"}]
        >>> PreferenceDataset(rows, Bytes())[0].rejected_mask.tolist()
        [0, 0, 0, 0, 1, 1, 1]
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any,
        max_length: int | None = None,
        truncation: str = "truncate",
        on_error: str = "raise",
    ) -> None:
        for name, value, allowed in (
            ("truncation", truncation, ("truncate", "drop", "error")),
            ("on_error", on_error, ("raise", "skip")),
        ):
            if value not in allowed:
                raise ConfigurationError(f"{name}={value!r}; expected one of {allowed}.")
        self._limit = None if max_length is None else natural("max_length", max_length, 2)
        self._truncation = truncation
        encoder, rows = Tokenizer(tokenizer), open_rows(source)
        self.name = rows.name
        self.num_read = len(rows)
        self.cut, self.dropped, self.skipped = Tally(), Tally(), Tally()
        self._pairs: list[Pair] = []
        self._numbers: list[int] = []
        for index in range(len(rows)):
            place = rows.place(index)
            try:
                pair = self._pair(rows[index], encoder, place)
            except DataError as error:
                if on_error == "raise":
                    raise
                self.skipped.add(place.number, message=str(error))
                continue
            if pair is not None:
                self._pairs.append(pair)
                self._numbers.append(place.number)
        longest = [max(len(pair.chosen), len(pair.rejected)) for pair in self._pairs]
        self.lengths = np.array(longest, np.int64)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Pair:
        """Row ``index``."""
        return self._pairs[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    def __repr__(self) -> str:
        return (
            f"PreferenceDataset({self.name}, {len(self)} of {self.num_read} rows, "
            f"{self.cut.count} cut, {self.dropped.count} dropped, {self.skipped.count} bad)"
        )

    def between(self, start: int, stop: int) -> PreferenceDataset:
        """A data set of the rows from ``start`` to ``stop``, which share what was read."""
        part = copy.copy(self)
        part._pairs, part._numbers = self._pairs[start:stop], self._numbers[start:stop]
        part.lengths = self.lengths[start:stop]
        return part

    def row_name(self, index: int) -> str:
        """What row ``index`` is called where it was read."""
        return f"{self.name}, row {self._numbers[index]}"

    def _pair(self, row: Any, tokenizer: Tokenizer, place: Place) -> Pair | None:
        parts: list[np.ndarray] = []
        is_long = is_empty = False
        for example in examples(row, tokenizer, place):
            tokens, mask = tokens_and_mask(example, tokenizer, "completions", place)
            if self._limit is not None and len(tokens) > self._limit:
                if self._truncation == "error":
                    raise place.error(
                        f"{len(tokens)} tokens, more than max_length={self._limit}. Raise it, or "
                        "set truncation='truncate' or 'drop'."
                    )
                is_long = True
                tokens, mask = tokens[: self._limit], mask[: self._limit]
            is_empty |= not any(mask[1:])
            parts += [np.array(tokens, np.int32), np.array(mask, np.uint8)]
        if is_empty or (is_long and self._truncation == "drop"):
            self.dropped.add(place.number)
            return None
        if is_long:
            self.cut.add(place.number)
        return Pair(*parts)


def examples(row: Any, tokenizer: Tokenizer, place: Place) -> list[Example]:
    """The chosen and the rejected answer of a row, each with its prompt.

    Raises:
        DataError: a field is missing, of another type, or no two answers to one prompt.
    """
    if not isinstance(row, Mapping):
        raise place.error(f"found {type(row).__name__}; expected an object with named fields.")
    answers = [required(row, name, place) for name in ANSWERS]
    prompt = row.get("prompt")
    if isinstance(prompt, str) or (prompt is None and isinstance(answers[0], str)):
        text = string(required(row, "prompt", place), "prompt", place)
        pairs = zip(ANSWERS, answers, strict=True)
        return [Completion(text, string(answer, name, place)) for name, answer in pairs]
    tokenizer.check_chat()
    turns = [listed(answer, name, place) for name, answer in zip(ANSWERS, answers, strict=True)]
    shared = _shared(*turns) if prompt is None else 0
    before = [] if prompt is None else listed(prompt, "prompt", place)
    tools = tool_list(row.get("tools"), "tools", place)
    return [
        _chat([*before, *own], len(before) + shared, name, tools, place)
        for name, own in zip(ANSWERS, turns, strict=True)
    ]


def _shared(chosen: list[Any], rejected: list[Any]) -> int:
    """Messages that both conversations begin with; the last one is an answer in any case."""
    count = 0
    while count < min(len(chosen), len(rejected)) - 1 and chosen[count] == rejected[count]:
        count += 1
    return count


def _chat(turns: list[Any], first: int, name: str, tools: Any, place: Place) -> Chat:
    """A conversation of which only the assistant's turns from ``first`` on are learned."""
    messages, learned = [], []
    for index, turn in enumerate(turns):
        where = f"{name}[{index}]"
        message, may_learn = chat_message(turn_mapping(turn, where, place), where, place)
        messages.append(message)
        learned.append(may_learn and index >= first)
    check_turns([message["role"] for message in messages], name, place)
    return Chat(messages, learned, tools, name)


class PreferenceBatches(TokenBatches):
    """Batches of pairs of similar length, padded to one of a few widths.

    With ``iter``, ``set_epoch`` and state as :class:`~mlx_fit.text.BucketBatches` has them.

    Args:
        dataset: a :class:`PreferenceDataset`.
        batch_size: pairs of a batch.
        max_shapes: shapes of all batches at most; the short last batch needs one of its own.
        shuffle: visit the pairs in a new order each epoch.
        seed: of the order. None draws one, which the state keeps.
        reference: log-probabilities of the answers under the reference model, of shape
            ``(rows, 2)``, from :func:`mlx_fit.preference.reference_log_probs`.

    Raises:
        ConfigurationError: an argument is wrong.
        DataError: the data set is empty.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        max_shapes: int = 32,
        shuffle: bool = True,
        seed: int | None = None,
        reference: np.ndarray | None = None,
    ) -> None:
        if not isinstance(dataset, PreferenceDataset):
            raise ConfigurationError(
                f"dataset is a {type(dataset).__name__}; expected a PreferenceDataset."
            )
        super().__init__(dataset, batch_size, seed)
        self.max_shapes = natural("max_shapes", max_shapes, 2)
        self.shuffle = boolean("shuffle", shuffle)
        self._grid = choose_grid(self.lengths, self.batch_size, self.max_shapes)
        self.widths = self._grid.widths
        if reference is not None and np.shape(reference) != (len(dataset), 2):
            raise ConfigurationError(
                f"reference has shape {np.shape(reference)}; expected ({len(dataset)}, 2)."
            )
        self._reference = None if reference is None else np.asarray(reference, np.float32)

    def _plan(self, epoch: int) -> list[Any]:
        seed = self.seed if self.shuffle else None
        return plan_by_length(self.lengths, self._grid, self.batch_size, seed, epoch)

    def _batch(self, planned: Any) -> PreferenceBatch:
        rows, width = planned
        batch = self.stack(self.dataset, rows, width)
        if self._reference is None:
            return batch
        return batch._replace(reference=self._reference[np.asarray(rows)])

    @staticmethod
    def stack(dataset: Any, rows: Any, width: int) -> PreferenceBatch:
        """The batch of some rows of a data set."""
        shape = (len(rows), 2, width)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        weights = np.zeros(shape, np.float32)
        for at, row in enumerate(rows):
            pair = dataset[int(row)]
            for side, (ids, mask) in enumerate((pair[:2], pair[2:])):
                tokens[at, side, : len(ids)] = ids
                targets[at, side, : len(ids) - 1] = ids[1:]
                weights[at, side, : len(ids) - 1] = mask[1:]
        reference = np.zeros((len(rows), 2), np.float32)
        return PreferenceBatch(tokens, targets, weights, reference)

    def _set_up(self) -> dict[str, Any]:
        has_reference = self._reference is not None
        return {
            "max_shapes": self.max_shapes,
            "shuffle": self.shuffle,
            "has_reference": has_reference,
        }
