"""The language models of the examples, on a little of the text and for a few steps."""

import json
import math
import runpy
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def examples(monkeypatch):
    """The scripts' folder is on the path, as Python has it for ``python examples/char_lm.py``."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))
    for name in ("ngram", "small_gpt"):
        sys.modules.pop(name, None)


def by_dictionaries(train, test, vocabulary, order):
    """Witten-Bell smoothing, one token after the other."""
    following = defaultdict(Counter)
    for length in range(order):
        for i in range(length, len(train)):
            following[tuple(train[i - length : i])][train[i]] += 1

    def probability(context, token):
        shorter = probability(context[1:], token) if context else 1 / vocabulary
        seen = following.get(tuple(context))
        if not seen:
            return shorter
        return (seen[token] + len(seen) * shorter) / (sum(seen.values()) + len(seen))

    logs = [
        math.log(probability(test[max(0, i - order + 1) : i], token))
        for i, token in enumerate(test)
    ]
    return math.exp(-sum(logs) / len(logs))


@pytest.mark.parametrize("order", [1, 2, 5])
def test_the_n_gram_model_is_that_of_plain_dictionaries(examples, order):
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 4, 300), rng.integers(0, 5, 40)  # 4 is never trained on
    found = examples("ngram")["perplexity"](train, test, 5, order)
    assert found == pytest.approx(by_dictionaries([*train], [*test], 5, order))


def test_a_packed_document_does_not_see_its_neighbours(examples):
    model = examples("small_gpt")["GPT"](11, 16, 2, 2)
    tokens = mx.array([[1, 2, 3, 4, 5, 6]])
    packed = model(tokens, segments=mx.array([[1, 1, 1, 2, 2, 2]]))
    apart = mx.concatenate([model(tokens[:, :3]), model(tokens[:, 3:])], axis=1)
    np.testing.assert_allclose(packed, apart, atol=1e-5)


@pytest.mark.parametrize("name", ["char_lm", "code_lm"])
def test_a_language_model_learns_and_shows_what_it_writes(name, tmp_path):
    """In a process of its own, as a user would."""
    limit = {"char_lm": "num_bytes=6000", "code_lm": "num_rows=12"}[name]
    code = (
        "import json, pathlib, small_gpt\n"
        f"import {name} as example\n"
        "example.WINDOW, small_gpt.NUM_SAMPLED = 32, 10\n"
        f"found = example.main(12, pathlib.Path({str(tmp_path)!r}), {limit})\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=EXAMPLES
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert 1 < found["transformer"] < {"char_lm": 256, "code_lm": 1024}[name] * 0.7
    assert found["5-gram"] > 1
    assert done.stdout.count("def read_lines") == 4  # one sample after each validation
    assert [*tmp_path.rglob("events.*")]
