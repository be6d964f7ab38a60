import csv
import gzip
import io
import random
from pathlib import Path

import numpy as np
import pytest

from mlx_fit.data import DataLoader, read_csv
from mlx_fit.errors import ConfigurationError, DataError

TABLE = "name,age,height\nann,31,1.7\nbob,29,1.85\n"


@pytest.fixture
def write(tmp_path):
    def written(content):
        path = tmp_path / "data.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


def test_rows_are_dicts_by_column(write):
    batch = next(iter(DataLoader(read_csv(write(TABLE)), batch_size=2)))
    assert batch["name"] == ["ann", "bob"]
    assert (batch["age"].dtype, batch["age"].tolist()) == (np.int64, [31, 29])
    assert batch["height"].dtype == np.float32
    np.testing.assert_allclose(batch["height"], [1.7, 1.85], rtol=1e-7)


def test_a_target_makes_pairs_of_a_vector_and_a_value(write):
    dataset = read_csv(write(TABLE), "age", columns=["height"])
    x, y = dataset[0]
    assert (x.shape, x.dtype, y.dtype, int(y)) == ((1,), np.float32, np.int64, 31)


@pytest.mark.parametrize("seed", range(20))
def test_values_are_those_of_the_csv_module(write, tmp_path, seed):
    rng = random.Random(seed)
    words = ["", "a b", 'say "x"', "é,日", "two\nlines", "x"]
    table = [
        [f"w{rng.choice(words)}", rng.randint(-9, 9), rng.choice([0.5, 1e-3])] for _ in range(9)
    ]
    delimiter = rng.choice(",;\t|")
    path = tmp_path / "random.csv"
    with path.open("w", newline="", encoding=rng.choice(["utf-8", "utf-8-sig"])) as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=rng.choice([0, 1, 2]))
        writer.writerows([["a", "b", "c"], *table])
    dataset = read_csv(path, delimiter=delimiter)
    for index, (a, b, c) in enumerate(table):
        row = dataset[index]
        assert (str(row["a"]), int(row["b"])) == (a, b)
        assert row["c"] == np.float32(c)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\n1\n\n2\n", [1, 2]),
        ("a\r\n1\r\n2", [1, 2]),
        (" a \n 1 \n2.5\n", [1, 2.5]),
        ("a\n1e3\n-inf\n", [1000, -np.inf]),
        (f"a\n{10**30}\n{'9' * 5000}\n", [1e30, np.inf]),
    ],
)
def test_numbers_and_blank_lines_are_read(write, content, expected):
    np.testing.assert_allclose(next(iter(DataLoader(read_csv(write(content)), 9)))["a"], expected)


def test_a_file_without_a_header_takes_names(write):
    dataset = read_csv(write("1,2\n3,4\n"), names=["a", "b"])
    assert [int(dataset[1][name]) for name in ("a", "b")] == [3, 4]


def test_empty_fields_become_what_missing_says(write):
    path = write("a,b\n1,2\n,3\n")
    assert np.isnan(read_csv(path, missing=float("nan"))[1]["a"])
    assert read_csv(path, missing=0)[1]["a"].dtype == np.int64


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        ("a,b\n1,2\n3,x\n", (3, 2, "b", 1), "field 'b' holds 'x'; expected a number"),
        ("a,b\n1,2\n\n3,\n", (4, 2, "b", 1), "field 'b' is empty; .*missing="),
        ("a,b\n1,2\n3,4_0\n", (3, 2, "b", 1), "'4_0'"),
        ("a,b\n1,2\n3,1e39\n", (3, 2, "b", 1), "float32 ends"),
        ("a,b\n1,2\n3\n", (3, 2, "b", 1), "has 1 fields; expected 2: a, b"),
        ("a,b\n1,2,3\n", (2, 3, None, 0), "has 3 fields"),
        ('a,b\n"x\ny",2\n"z\n",w\n', (4, 2, "b", 1), "holds 'w'"),
        ('a,b\n1,2\n"3"x,4\n', (3, None, None, None), "bad quotes"),
        ('a,b\n1,2\n"3,4\n', (3, None, None, None), "bad quotes"),
        (b"a,b\n1,2\n3,\xff\n", (3, 2, None, None), "byte 0xff is not UTF-8"),
        ("a,a\n1,2\n", (1, 2, None, None), "'a', which comes twice"),
        ("\na,\n1,2\n", (2, 2, None, None), "'', which is no name"),
        ("a,b\n", (None, None, None, None), "no row"),
        ("", (None, None, None, None), "is empty"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(write, content, place, message):
    path = write(content)
    with pytest.raises(DataError, match=message) as caught:
        read_csv(path)
    error = caught.value
    assert (error.line, error.column, error.field, error.index) == place
    where = ":".join(str(part) for part in (path, error.line, error.column) if part is not None)
    assert str(error).startswith(f"{where}: ")


def test_text_in_x_is_named(write):
    with pytest.raises(DataError, match="'name' holds text") as caught:
        read_csv(write(TABLE), target="age")
    assert (caught.value.line, caught.value.column, caught.value.field) == (2, 1, "name")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "age", "columns": ["age"]}, "x or y"),
        ({"target": "weight"}, "no column 'weight'. The file has: name, age, height"),
        ({"columns": ["age", "age"]}, "twice"),
        ({"columns": "age"}, "columns='age'"),
        ({"columns": []}, "no column to read"),
        ({"target": "age", "columns": []}, "no column to read"),
        ({"names": "abc"}, "names='abc'"),
        ({"delimiter": ",,"}, "delimiter=',,'"),
        ({"missing": "0"}, "missing='0'"),
    ],
)
def test_arguments_that_cannot_work_are_refused(write, options, message):
    with pytest.raises(ConfigurationError, match=message):
        read_csv(write(TABLE), **options)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv: cannot be read"):
        read_csv(tmp_path / "none.csv")


PIECES = [*(b'"', b",", b"\n", b"\r", b"\r\n", b";", b" ", b"\0", b"\xff", b"\xef\xbb\xbf")]
PIECES += [b"1", b"-", b".5", b"1e999", b"nan", b"x", "é".encode(), b'""', b"_", b"\t", b"9" * 30]
SEED = b'id,text,score\n1,"a, ""b""",0.5\n2,two words,-1e3\n\n3,"li\nne",7\n'


OPTIONS = ({}, {"missing": 0.5}, {"columns": ["id"], "target": "score"})


@pytest.fixture
def in_memory(monkeypatch):
    """A function that lets every path be a file with this content: 20,000 real ones take long."""

    def given(content):
        monkeypatch.setattr(Path, "open", lambda path, mode: io.BytesIO(content))
        return "data.csv"

    return given


def mutated(rng):
    content = bytearray(SEED)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        content[start : start + rng.choice([0, 0, 1, 3])] = rng.choice(PIECES)
    return bytes(content)


def test_mutated_files_give_their_rows_or_an_error_with_its_place(in_memory):
    """20,000 files: each is read as the csv module reads it, or refused by line and field."""
    rng = random.Random(0)
    num_read = num_refused = 0
    for number in range(20_000):
        content, options = mutated(rng), OPTIONS[number % len(OPTIONS)]
        try:
            dataset = read_csv(in_memory(content), **options)
        except DataError as error:
            check_place(error, content)
            num_refused += 1
        except ConfigurationError:  # its header is another one now
            assert "target" in options
            assert not content.removeprefix(b"\xef\xbb\xbf").startswith(b"id,text,score\n")
        else:
            check_rows(dataset, content, options)
            num_read += 1
    assert num_read > 4000 < num_refused


def check_place(error, content):
    text = str(error)
    assert error.path == "data.csv"
    if "no row" in text or "is empty; expected a line" in text:
        return  # nothing has no place
    assert 1 <= error.line <= content.count(b"\n") + content.count(b"\r") + 1
    if "bad quotes" in text:
        return  # there are no fields to tell apart
    assert error.column >= 1
    if "field '" in text:
        assert error.field
        assert error.index >= 0


def check_rows(dataset, content, options):
    text = content.removeprefix(b"\xef\xbb\xbf").decode()
    header, *rows = [row for row in csv.reader(text.splitlines(True)) if row]
    header = [name.strip() for name in header]
    assert len(dataset) == len(rows)
    for index, expected in enumerate(rows):
        row = dataset[index]
        if "target" in options:
            row = {"id": row[0][0], "score": row[1]}
        for name, value in row.items():
            field = expected[header.index(name)]
            if not isinstance(value, str):
                field = field if field.strip() else options["missing"]
                same = np.array_equal(np.float32(float(field)), np.float32(value), equal_nan=True)
            else:
                same = field == value
            assert same, (content, name, field, value)


def test_a_compressed_file_is_read_like_any_other(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n1,2\n3,4\n"))
    assert [row["b"] for row in read_csv(path)] == [2, 4]


@pytest.mark.parametrize(
    "content", [b"a,b\n1,2\n", gzip.compress(b"a,b\n1,2\n" * 99)[:-9]], ids=["plain", "cut"]
)
def test_a_compressed_file_that_is_none_or_ends_early_is_a_data_error(tmp_path, content):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_csv(path)
