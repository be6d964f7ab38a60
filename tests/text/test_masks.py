"""Targets of chats and completions, against the text that the masked-in tokens decode to."""

from __future__ import annotations

import numpy as np
import pytest
from chat_templates import (
    CHATML,
    END_OF_TURN,
    MISTRAL,
    QWEN,
    TEMPLATES,
    Bytes,
    tokenizer_with,
    unmarked,
)

from mlx_fit.errors import DataError
from mlx_fit.text import TextDataset

QUESTIONS = ["def f(x):", "  and g?", "é\n\n"]
ANSWERS = ["return x + 1", "import os\nimport re", "日本 <b>"]
NO_PROMPT = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
PLAIN = NO_PROMPT + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


def chat(questions=QUESTIONS, answers=ANSWERS):
    turns = zip(questions, answers, strict=True)
    pairs = [[("user", question), ("assistant", answer)] for question, answer in turns]
    return {"messages": [{"role": role, "content": said} for pair in pairs for role, said in pair]}


def learned(tokenizer, row, **options):
    """The text of the targets, run by run."""
    ((tokens, mask),) = TextDataset([row], tokenizer, **options)
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(tokens[start:stop]) for start, stop in edges]


def refusal(tokenizer, row, **options):
    with pytest.raises(DataError) as caught:
        TextDataset([row], tokenizer, **options)
    return str(caught.value)


@pytest.mark.parametrize("marks", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_targets_are_the_answers_with_their_end_of_turn_token(family, marks):
    template = TEMPLATES[family] if marks else unmarked(TEMPLATES[family])
    tokenizer, lead = tokenizer_with(template), " " if family == "mistral" else ""
    expected = [lead + answer + END_OF_TURN[family] for answer in ANSWERS]
    assert learned(tokenizer, chat()) == expected
    assert learned(tokenizer, chat(), train_on="last") == expected[-1:]


@pytest.mark.parametrize("family", TEMPLATES)
def test_tokens_are_those_of_transformers_with_one_bos(family):
    tokenizer = tokenizer_with(TEMPLATES[family])
    (tokens, mask), *_ = TextDataset([chat()], tokenizer, train_on="all")
    text = tokenizer.apply_chat_template(chat()["messages"], tokenize=False)
    assert tokens.tolist() == tokenizer.encode(text, add_special_tokens=False)
    assert np.count_nonzero(tokens == tokenizer.bos_token_id) == (family in "llama mistral gemma")
    assert mask.tolist() == [0] + [1] * (len(tokens) - 1)


def test_markers_give_the_mask_of_transformers():
    tokenizer = tokenizer_with(CHATML)
    ((tokens, mask),) = TextDataset([chat()], tokenizer)
    out = tokenizer.apply_chat_template(
        chat()["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokens.tolist() == out["input_ids"]
    assert mask.tolist() == out["assistant_masks"]


@pytest.mark.parametrize("marks", [True, False], ids=["marked", "unmarked"])
def test_mlx_lms_wrapper_gives_the_same(marks):
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    tokenizer = tokenizer_with(CHATML if marks else unmarked(CHATML))
    bare, wrapped = (TextDataset([chat()], t)[0] for t in (tokenizer, TokenizerWrapper(tokenizer)))
    assert [part.tolist() for part in wrapped] == [part.tolist() for part in bare]


def test_an_end_of_turn_that_markers_leave_out_is_learned():
    shut = "{{- m.content + '<|im_end|>' -}}{% endgeneration %}"
    assert shut in CHATML
    template = CHATML.replace(shut, "{{- m.content -}}{% endgeneration %}{{- '<|im_end|>' -}}")
    expected = [answer + "<|im_end|>" for answer in ANSWERS]
    assert learned(tokenizer_with(template), chat()) == expected


THOUGHTS = chat(["a", "b"], ["<think>hm</think>\nc", "<think>so</think>\nd"])


def test_a_template_that_rewrites_history_works_with_markers():
    expected = ["c<|im_end|>", "<think>so</think>\nd<|im_end|>"]
    assert learned(tokenizer_with(QWEN), THOUGHTS) == expected


def test_a_template_that_rewrites_history_is_refused_without_markers():
    tokenizer = tokenizer_with(unmarked(QWEN))
    text = refusal(tokenizer, THOUGHTS)
    assert text.startswith("row 0: messages[1]: the chat template is not prefix-preserving")
    expected = ["<think>so</think>\nd<|im_end|>"]
    assert learned(tokenizer, THOUGHTS, train_on="last") == expected


def test_a_header_is_not_learned_where_add_generation_prompt_is_ignored():
    template = unmarked(CHATML).replace("add_generation_prompt", "false")
    text = refusal(tokenizer_with(template), chat())
    assert "messages[1]: where the answer starts is not known" in text
    assert learned(tokenizer_with(unmarked(MISTRAL)), chat()), "which needs no header"


@pytest.mark.parametrize("answer", ["hello", " hello", "    return x", "\n    x"])
@pytest.mark.parametrize("template", [PLAIN, unmarked(CHATML), CHATML])
def test_a_token_that_spans_the_start_of_an_answer_is_cut_in_two(template, answer):
    tokenizer = tokenizer_with(template)
    row, end = chat(["q"] * 2, [answer] * 2), "\n" if template is PLAIN else "<|im_end|>"
    assert learned(tokenizer, row) == [answer + end] * 2
    ((tokens, _),) = TextDataset([row], tokenizer)
    assert tokenizer.decode(tokens) == tokenizer.apply_chat_template(
        row["messages"], tokenize=False
    )


def test_control_tokens_in_what_users_say_do_not_move_the_mask():
    row = chat(["<|im_end|>\n<|im_start|>assistant\nno", "b"], ["c<|im_end|> d", "e"])
    for template in (CHATML, unmarked(CHATML)):
        expected = ["c<|im_end|> d<|im_end|>", "e<|im_end|>"]
        assert learned(tokenizer_with(template), row) == expected


def test_a_turn_of_weight_0_is_no_target():
    row = chat()
    row["messages"][3]["weight"] = 0
    for template in (CHATML, unmarked(CHATML)):
        expected = [answer + "<|im_end|>" for answer in (ANSWERS[0], ANSWERS[2])]
        assert learned(tokenizer_with(template), row) == expected


def test_a_tokenizer_of_ones_own_needs_no_keyword_but_add_generation_prompt():
    assert learned(Bytes(), chat(["a", "b"], ["c", "d"])) == ["c</s>", "d</s>"]


class TextMarks(Bytes):
    """ChatML in bytes: its marks are no control tokens."""

    def apply_chat_template(self, messages, add_generation_prompt=False):
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        return list(("".join(turns) + "<|im_start|>assistant\n" * add_generation_prompt).encode())


def test_an_end_of_turn_mark_need_not_be_a_control_token():
    assert learned(TextMarks(), chat(["a", "b"], ["c\n", "d"])) == ["c\n<|im_end|>", "d<|im_end|>"]


class NoPrompt(Bytes):
    decode = None

    def apply_chat_template(self, messages):
        return super().apply_chat_template(messages)


def test_without_that_keyword_and_without_decode_a_header_is_still_not_learned():
    assert "where the answer starts is not known" in refusal(NoPrompt(), chat())


class Strings(Bytes):
    """Renders text alone; ``encode`` adds a BOS, and knows that of the template."""

    bos_token = "<s>"

    def encode(self, text):
        return [256] + [*text.removeprefix("<s>").encode()] if "<s>" not in text else [
            256, 256, *text.removeprefix("<s>").encode()
        ]  # fmt: skip

    def apply_chat_template(self, messages, add_generation_prompt=False):
        said = "".join(f"{m['role']}:{m['content']}\n" for m in messages)
        return "<s>" + said + "assistant:" * add_generation_prompt


def test_a_template_that_gives_text_has_one_bos():
    ((tokens, mask),) = TextDataset([chat(["a"], ["b"])], Strings())
    assert bytes(tokens[1:].tolist()) == b"user:a\nassistant:b\n"
    assert tokens[0] == 256
    assert bytes(tokens[mask == 1].tolist()) == b"b\n"


def test_tools_reach_the_template_and_calls_are_learned():
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
        "{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "seven"},
    ]
    row = {"messages": turns, "tools": [{"name": "f"}]}
    tokenizer = tokenizer_with(template)
    assert learned(tokenizer, row) == ['{"x": 1}<|im_end|>', "seven<|im_end|>"]
    assert tokenizer.decode(TextDataset([row], tokenizer)[0][0]).startswith('[{"name": "f"}]')
    assert "tool_calls, which the chat template leaves out" in refusal(tokenizer_with(CHATML), row)
    assert "apply_chat_template takes none" in refusal(Bytes(), row)


def test_function_calls_of_sharegpt_are_calls_where_the_template_knows_them():
    said = '{"name": "f", "arguments": {"x": 1}}'
    row = {
        "conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": said}]
    }
    knows = CHATML.replace(
        "{{- m.content", "{{- m.tool_calls[0].function.name if m.tool_calls -}}{{- m.content"
    )
    assert learned(tokenizer_with(knows), row) == ["f<|im_end|>"]
    assert learned(tokenizer_with(CHATML), row) == [said + "<|im_end|>"]


def test_what_a_template_raises_names_the_row():
    row = {"messages": [{"role": "system", "content": "s"}, *chat()["messages"]]}
    text = refusal(tokenizer_with(TEMPLATES["gemma"]), row)
    assert text.startswith("row 0: the tokenizer refused the row: ")
    assert "System role not supported" in text


@pytest.mark.parametrize(("prompt", "completion"), [("def f", "oo(x):"), ("q: ", "a"), ("", "a b")])
def test_a_completion_is_learned_with_its_eos(prompt, completion):
    tokenizer = tokenizer_with()
    row = {"prompt": prompt, "completion": completion}
    ((tokens, mask),) = TextDataset([row], tokenizer)
    assert tokenizer.decode(tokens[mask == 1]) == completion + "</s>"
    assert tokenizer.decode(tokens) == f"<s>{prompt}{completion}</s>"
    assert tokens[: mask.argmax()].tolist() == tokenizer.encode(prompt), "as it is when it is used"
    assert TextDataset([row], tokenizer, train_on="all")[0][1].tolist() == [0] + [1] * (
        len(tokens) - 1
    )


def test_a_completion_after_a_space_keeps_its_text_with_sentencepieces_way_of_writing_spaces():
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {"\u2581": 0, "q": 1, ":": 2, "a": 3, "\u2581a": 4, "\u2581q": 5, "<unk>": 6}
    pieces = [("\u2581", "a"), ("\u2581", "q")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pieces, unk_token="<unk>"))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Metaspace()
    ((tokens, mask),) = TextDataset([{"prompt": "q: ", "completion": "a"}], tokenizer)
    assert (tokens.tolist(), mask.tolist()) == ([5, 2, 4], [0, 0, 1])
    ((tokens, mask),) = TextDataset([{"prompt": "q:", "completion": " a"}], tokenizer)
    assert (tokens.tolist(), mask.tolist()) == ([5, 2, 4], [0, 0, 1])


class Words:
    """A token per word; what is written without a space is an unknown word."""

    words = ("?", "a", "b", "c", "d")

    def encode(self, text):
        return [self.words.index(word) if word in self.words else 0 for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def test_a_tokenizer_of_words_gets_prompt_and_completion_by_themselves():
    ((tokens, mask),) = TextDataset([{"prompt": "a b", "completion": "c d"}], Words())
    assert (tokens.tolist(), mask.tolist()) == ([1, 2, 3, 4], [0, 0, 1, 1])


def test_text_is_learned_whole_whatever_train_on():
    tokenizer = tokenizer_with()
    for train_on in ("completions", "last", "all"):
        ((tokens, mask),) = TextDataset(
            [{"text": "<s>import os</s>"}], tokenizer, train_on=train_on
        )
        assert tokenizer.decode(tokens) == "<s>import os</s>", "one BOS, one EOS"
        assert mask.tolist() == [0] + [1] * (len(tokens) - 1)


def test_alpaca_and_completions_can_be_chats():
    tokenizer = tokenizer_with(CHATML)
    row = {"prompt": "q", "completion": "a"}
    assert learned(tokenizer, row, use_chat_template=True) == ["a<|im_end|>"]
    assert learned(tokenizer, row) == ["a</s>"]


def test_template_options_reach_the_template():
    template = CHATML.replace("{%- for m", "{{- mood -}}{%- for m", 1)
    options = {"template_options": {"mood": "calm"}, "train_on": "all"}
    ((tokens, _),) = TextDataset([chat()], tokenizer_with(template), **options)
    assert tokenizer_with().decode(tokens).startswith("calm<|im_start|>")
