"""The README's example runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def example() -> str:
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return code


def test_the_twenty_lines_run_and_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example(), "README.md", "exec"), names)
    assert names["history"].best("val_accuracy")[1] > 0.9
    assert (tmp_path / "runs" / "digits.safetensors").is_file()
    assert "(297, 10)" in capsys.readouterr().out


def test_the_example_is_short():
    assert len(example().splitlines()) <= 25
