"""Token losses, whole or in chunks that never hold the logits of all tokens.

A chunk's gradient is computed beside its loss and handed out when the whole is differentiated, so
that the head runs once. MLX evaluates breadth-first: without the dependency from one chunk to the
next all of them would be in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_fit.sums import long_sum

Head = Callable[[mx.array, mx.array, Sequence[mx.array]], mx.array]


class TokenSums(NamedTuple):
    """Weighted sums over tokens, float32 scalars.

    Attributes:
        loss: what is minimised. nll: the negative log-likelihood alone, for the perplexity.
        correct: targets that have the highest logit.
    """

    loss: mx.array
    nll: mx.array
    correct: mx.array


@dataclass(frozen=True)
class TokenLoss:
    """Cross-entropy of logits with label smoothing and z-loss.

    ``(1 - e) nll + e mean_over_classes(-log p) + z logsumexp(logits)^2``; smoothing as in Szegedy
    et al. 2016 (arXiv 1512.00567, section 7), the z-loss as in PaLM (arXiv 2204.02311, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def sums(self, logits: mx.array, targets: mx.array, weights: mx.array) -> TokenSums:
        """Sums over ``logits`` of shape (tokens, classes); ``targets``, ``weights``: (tokens,)."""
        logits = logits.astype(mx.float32)
        lse = mx.logsumexp(logits, -1)
        means = [logits.mean(-1)] if self.label_smoothing else []
        best = mx.argmax(logits, -1)
        return self._sums(lse, targets, weights, _pick(logits, targets), best, *means)

    def fused(self, targets: mx.array, weights: mx.array) -> Any:
        """The same as a function of logits, with a gradient that needs one array of their size.

        The exponentials are most of its work, so that they are taken once: the gradient has use for
        the probabilities, and the logarithm of the largest of them gives ``logsumexp``.
        """

        @mx.custom_function
        def loss(logits: mx.array) -> list[mx.array]:
            values = logits.astype(mx.float32)
            best = mx.argmax(values, -1)
            looked_up = [_pick(values, best), _pick(values, targets), best]
            if self.label_smoothing:
                looked_up.append(values.mean(-1))
            # Last of what looks at the logits, so that it can take their place in memory.
            [values] = mx.depends([values], looked_up)
            probabilities = mx.softmax(values, -1)
            # At least 1 / classes, whose logarithm is exact to float32 rounding.
            lse = looked_up[0] - mx.log(_pick(probabilities, best))
            return [*self._sums(lse, targets, weights, *looked_up[1:]), probabilities, lse]

        @loss.vjp
        def gradient(logits: mx.array, cotangents: Any, outputs: Any) -> mx.array:
            # Last of what looks at the logits: one array of their size fewer at a time, measured.
            *sums, probabilities, lse = outputs
            [probabilities] = mx.depends([probabilities], [*sums, lse])
            found = self._gradient(probabilities, lse, targets, weights * cotangents[0])
            return found.astype(logits.dtype)

        return loss

    def _sums(
        self,
        lse: mx.array,
        targets: mx.array,
        weights: mx.array,
        of_target: mx.array,
        best: mx.array,
        mean: mx.array | None = None,
    ) -> TokenSums:
        nll = lse - of_target
        loss = nll
        if mean is not None:
            loss = (1 - self.label_smoothing) * nll + self.label_smoothing * (lse - mean)
        if self.z_loss:
            loss = loss + self.z_loss * lse.square()
        correct = (best == targets).astype(mx.float32)
        return TokenSums(*[long_sum(value * weights) for value in (loss, nll, correct)])

    def _gradient(
        self, probabilities: mx.array, lse: mx.array, targets: mx.array, weights: mx.array
    ) -> mx.array:
        num_classes = probabilities.shape[-1]
        if self.z_loss:
            probabilities = probabilities * (1 + 2 * self.z_loss * lse)[:, None]
        is_target = mx.arange(num_classes)[None] == targets[:, None]
        share = mx.where(is_target, 1 - self.label_smoothing, 0.0)
        if self.label_smoothing:
            share = share + self.label_smoothing / num_classes
        return (probabilities - share) * weights[:, None]


def whole_sums(
    loss: TokenLoss, logits: mx.array, targets: mx.array, weights: mx.array, trains: bool
) -> TokenSums:
    """The sums of ``loss`` over all logits at once, shape (tokens, classes)."""
    if not trains:
        return loss.sums(logits, targets, weights)
    return TokenSums(*loss.fused(targets, weights)(logits)[:3])


def chunked_sums(
    loss: TokenLoss,
    head: Head,
    hidden: mx.array,
    parameters: Sequence[mx.array],
    tokens: mx.array,
    targets: mx.array,
    weights: mx.array,
    chunk_size: int,
    trains: bool,
) -> TokenSums:
    """The sums of ``loss`` over ``head(hidden)``, ``chunk_size`` tokens at a time.

    Args:
        loss: the token loss.
        head: ``head(hidden, tokens, parameters)`` gives logits of shape ``(1, chunk, classes)``
            from hidden states ``(1, chunk, dims)`` and the tokens they belong to, ``(1, chunk)``.
        hidden: shape (tokens, dims).
        parameters: the head's trainable arrays; gradients go to them and to ``hidden``.
        tokens, targets, weights: shape (tokens,).
        chunk_size: tokens of a chunk.
        trains: computes gradients with the loss; False leaves them to MLX, which is right but
            holds every chunk's logits if somebody asks for gradients after all.
    """
    bounds = _bounds(len(hidden), chunk_size)

    def chunk(hidden: mx.array, parameters: Sequence[mx.array], start: int, end: int) -> Any:
        logits = head(hidden[None], tokens[None, start:end], parameters)
        logits = logits.reshape(-1, logits.shape[-1])  # [0] would cost two arrays in the gradient
        if not trains:
            return list(loss.sums(logits, targets[start:end], weights[start:end]))
        values = loss.fused(targets[start:end], weights[start:end])(logits)
        return values[0], values[1:3]

    if not trains:
        found: list[list[mx.array]] = []
        for start, end in bounds:
            part = _after(found[-1] if found else [], hidden[start:end])
            found.append(chunk(part, parameters, start, end))
        return _added(found)

    def loss_and_gradients(hidden: mx.array, *parameters: mx.array) -> list[mx.array]:
        differentiate = mx.value_and_grad(chunk, argnums=(0, 1))
        sums, slopes, totals = [], [], [mx.array(0.0)] * len(parameters)
        last: list[Any] = []
        for start, end in bounds:
            part = _after(last, hidden[start:end])
            (value, rest), (slope, own) = differentiate(part, list(parameters), start, end)
            # Sums over chunks in float32: half-precision ones would lose their digits.
            totals = [a + b.astype(mx.float32) for a, b in zip(totals, own, strict=True)]
            sums.append([value, *rest])
            slopes.append(slope)
            last = [value, slope, *totals]
        return [*_added(sums), mx.concatenate(slopes), *totals]

    whole = mx.custom_function(loss_and_gradients)

    @whole.vjp
    def gradient(primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
        return [
            (cotangents[0] * slope.astype(mx.float32)).astype(primal.dtype)
            for primal, slope in zip(_listed(primals), outputs[3:], strict=True)
        ]

    results: Any = whole(hidden, *parameters)
    return TokenSums(*results[:3])


def log_probs(logits: mx.array, targets: mx.array) -> mx.array:
    """Log-probabilities of ``targets``, float32 (tokens,), from logits of (tokens, classes).

    What the gradient needs is computed with them, as :meth:`TokenLoss.fused` does.
    """

    @mx.custom_function
    def found(logits: mx.array) -> list[mx.array]:
        values = logits.astype(mx.float32)
        best = mx.argmax(values, -1)
        looked_up = [_pick(values, best), _pick(values, targets)]
        [values] = mx.depends([values], looked_up)
        probabilities = mx.softmax(values, -1)
        lse = looked_up[0] - mx.log(_pick(probabilities, best))
        return [looked_up[1] - lse, probabilities]

    @found.vjp
    def gradient(logits: mx.array, cotangents: Any, outputs: Any) -> mx.array:
        [probabilities] = mx.depends([outputs[1]], [outputs[0]])
        is_target = mx.arange(logits.shape[-1])[None] == targets[:, None]
        return ((is_target - probabilities) * cotangents[0][:, None]).astype(logits.dtype)

    results: Any = found(logits)
    return results[0]


def chunked_log_probs(
    head: Head,
    hidden: mx.array,
    parameters: Sequence[mx.array],
    tokens: mx.array,
    targets: mx.array,
    chunk_size: int,
    trains: bool,
) -> mx.array:
    """:func:`log_probs` of ``head(hidden)``, ``chunk_size`` tokens at a time.

    What becomes of them is not known here, so that the gradient of a head that trains waits for it
    and runs the head again. Where only ``hidden`` has one, it is taken at once and scaled then.
    Arguments are those of :func:`chunked_sums`.
    """
    bounds = _bounds(len(hidden), chunk_size)

    def chunk(hidden: mx.array, parameters: Sequence[mx.array], start: int, end: int) -> mx.array:
        logits = head(hidden[None], tokens[None, start:end], parameters)
        return log_probs(logits.reshape(-1, logits.shape[-1]), targets[start:end])

    def values(hidden: mx.array, *parameters: mx.array) -> mx.array:
        found: list[mx.array] = []
        for start, end in bounds:
            part = _after(found[-1:], hidden[start:end])
            found.append(chunk(part, parameters, start, end))
        return mx.concatenate(found)

    def slopes(hidden: mx.array, parameters: Sequence[mx.array], factors: mx.array) -> Any:
        """The values, and gradients of their sum with factors."""
        found, parts, totals = [], [], [mx.array(0.0)] * len(parameters)
        last: list[Any] = []
        for start, end in bounds:
            part = _after(last, hidden[start:end])
            run = partial(_with_list, chunk, start, end)
            [value], [slope, *own] = mx.vjp(run, [part, *parameters], [factors[start:end]])
            totals = [a + b.astype(mx.float32) for a, b in zip(totals, own, strict=True)]
            found.append(value)
            parts.append(slope)
            last = [value, slope, *totals]
        return mx.concatenate(found), mx.concatenate(parts), totals

    if not trains:
        return values(hidden, *parameters)
    if parameters:
        whole = mx.custom_function(values)

        @whole.vjp
        def gradient(primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
            hidden, *parameters = _listed(primals)
            _, slope, totals = slopes(hidden, parameters, cotangents)
            pairs = zip(totals, parameters, strict=True)
            return [slope, *[total.astype(array.dtype) for total, array in pairs]]

        found: Any = whole(hidden, *parameters)
        return found

    @mx.custom_function
    def at_once(hidden: mx.array) -> list[mx.array]:
        return [*slopes(hidden, [], mx.ones(len(hidden)))[:2]]

    @at_once.vjp
    def scaled(hidden: mx.array, cotangents: Any, outputs: Any) -> mx.array:
        factors = cotangents[0][:, None]
        return (factors * outputs[1].astype(mx.float32)).astype(hidden.dtype)

    results: Any = at_once(hidden)
    return results[0]


def _with_list(function: Any, start: int, end: int, hidden: mx.array, *parameters: mx.array) -> Any:
    return function(hidden, parameters, start, end)


def _bounds(length: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _listed(primals: Any) -> Sequence[mx.array]:
    """MLX passes a single argument as it is, several as a tuple."""
    return [primals] if isinstance(primals, mx.array) else primals


def _after(previous: Any, array: mx.array) -> mx.array:
    """``array``, not looked at before ``previous`` is computed."""
    return mx.depends([array], previous)[0] if previous else array


def _added(sums: list[list[mx.array]]) -> TokenSums:
    return TokenSums(*[mx.stack(list(values)).sum() for values in zip(*sums, strict=True)])


def _pick(values: mx.array, indices: mx.array) -> mx.array:
    """One value of each row, shape (rows,)."""
    return mx.take_along_axis(values, indices[:, None], -1)[:, 0]
