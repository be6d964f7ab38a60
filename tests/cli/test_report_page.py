"""``mlx-fit report``: the page, read with Python's own HTML parser."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_fit import CSVLogger, DataError, JSONLogger, Trainer
from mlx_fit.checkpoint.format import read_document
from mlx_fit.cli import main
from mlx_fit.cli.report_charts import MOST, Axis, Curve, chart, thinned
from mlx_fit.cli.report_page import common_axis, page
from mlx_fit.cli.report_runs import Run, name_runs, read_run

X = np.float32(np.random.default_rng(0).normal(size=(24, 3)))
Y = X[:, :1] * 2
VOID = {"meta"}  # those of SVG close themselves


class Page(HTMLParser):
    """Tables by the heading above them, curves by title, all text; raises on unbalanced tags."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.tables, self.kinds, self.tags = [], [], {}, {}, []
        self.heading, self.titles = "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h2", "h3", "title"):
            self.text.append("")
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
            self.kinds.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")
            self.kinds[self.heading][-1].append(dict(attrs).get("class"))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("h2", "h3"):
            self.heading = self.text[-1]
        if tag == "title":
            self.titles.append(self.text[-1])

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[self.heading][-1][-1] += data
        elif self.open and self.open[-1] in ("h2", "h3", "title"):
            self.text[-1] += data

    def rows(self, heading):
        return {row[0]: row[1:] for row in self.tables[heading]}


def report(*paths, code=0):
    """The page of some runs."""
    out = paths[0].parent / "page" / "report.html"
    assert main(["report", *map(str, paths), "-o", str(out)]) == code
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with checkpoints and logs: ``a`` of 3 epochs, ``b`` of 2 and another rate."""
    folder = tmp_path_factory.mktemp("runs")
    histories = {}
    for name, rate, epochs in (("a", 0.1, 3), ("b", 0.01, 2)):
        mx.random.seed(1)
        trainer = Trainer(nn.Linear(3, 1), optim.SGD(rate), "mse", metrics=["mae"], batch_size=8)
        loggers = [CSVLogger(folder / f"{name}.csv"), JSONLogger(folder / f"{name}.jsonl")]
        options = {"callbacks": loggers, "checkpoint_dir": folder / name, "verbose": 0}
        histories[name] = trainer.fit((X, Y), (X, Y), epochs=epochs, **options)
    return folder, histories


def points(found, title):
    """Values of a curve's dots, from the texts that they show."""
    texts = [t for t in found.titles if t.startswith(f"{title}: ")]
    return [(float(t.split(" at ")[1]), float(t.split(": ")[1].split(" at")[0])) for t in texts]


def test_every_value_of_every_curve_is_in_the_picture(runs):
    folder, histories = runs
    found = report(folder / "a", folder / "b")
    for name, history in histories.items():
        for key, label in (("loss", "training loss"), ("val_mae", "validation mae")):
            drawn = points(found, f"{name}, {label}")
            assert [place for place, _ in drawn] == [epoch + 1 for epoch in history.epoch]
            np.testing.assert_allclose([v for _, v in drawn], history.history[key], rtol=1e-4)


def test_final_values_stand_side_by_side_and_the_best_is_marked(runs):
    folder, histories = runs
    found = report(folder / "a", folder / "b")
    assert found.tables["Final metrics"][0] == ["", "a", "b"]
    cells = found.rows("Final metrics")["val_loss"]
    for cell, history in zip(cells, histories.values(), strict=True):
        epoch, best = history.best("val_loss")
        last = history.last["val_loss"]
        assert cell == f"{last:.5g} (best {best:.5g} at epoch {epoch + 1})"
    index = [row[0] for row in found.tables["Final metrics"]].index("val_loss")
    assert found.kinds["Final metrics"][index] == [None, "best", None]


def test_arguments_that_differ_are_marked_and_others_not(runs):
    folder, _ = runs
    found = report(folder / "a", folder / "b", folder / "a.csv")
    rows = found.rows("Arguments")
    marked = {key for key in rows if key.startswith("≠")}
    assert marked == {"≠ optimizer.learning_rate", "≠ epochs"}
    assert rows["≠ optimizer.learning_rate"] == ["0.1", "0.01", "-"]
    assert rows["batch_size"] == ["8", "8", "-"]
    for row, kinds in zip(found.tables["Arguments"], found.kinds["Arguments"], strict=True):
        expected = "differs" if row[0] in marked else None
        assert kinds[1:] == [expected, expected, None]
    assert found.rows("Environment")["mlx"] == [mx.__version__, mx.__version__, "-"]


def test_one_run_alone_has_nothing_marked(runs):
    found = report(runs[0] / "a")
    assert not {"differs", "best"} & {attrs.get("class") for _, attrs in found.tags}


def test_checkpoints_are_listed_with_their_sizes(runs):
    folder, histories = runs
    found = report(folder / "a")
    (heading,) = [heading for heading in found.tables if heading.startswith("a: ")]
    places = sorted((folder / "a").iterdir())
    sizes = [sum(file.stat().st_size for file in place.iterdir()) for place in places]
    assert heading == f"a: {sum(sizes) / 1024:.1f} KiB"
    for row, place, size in zip(found.tables[heading][1:], places, sizes, strict=True):
        assert row[0] == place.name
        assert row[1] == str(read_document(place)["step"])
        assert row[3] == f"{size / 1024:.1f} KiB"
    assert f"val_loss {histories['a'].last['val_loss']:.5g}" in found.tables[heading][-1][4]


def test_a_damaged_checkpoint_is_named_and_an_earlier_one_read(runs, tmp_path):
    (tmp_path / "a").mkdir()
    for place in sorted((runs[0] / "a").iterdir()):
        copy = tmp_path / "a" / place.name
        copy.mkdir()
        for file in place.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    state = copy / "state.json"
    state.write_text(state.read_text().replace("mse", "mae"))
    found = report(tmp_path / "a")
    assert found.rows("Runs")["steps"] == ["6"]
    (table,) = [rows for heading, rows in found.tables.items() if heading.startswith("a: ")]
    assert table[-1][:2] == [copy.name, "DAMAGED"]
    single = read_run(copy.parent / "step-00000006")
    assert (single.step, single.num_epochs) == (6, 2)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_log_files_give_the_curves_of_the_checkpoint(runs, suffix):
    folder, _ = runs
    whole, log = read_run(folder / "a"), read_run(folder / f"a{suffix}")
    assert log.by_epoch == whole.by_epoch
    assert log.num_epochs == 3
    assert log.step == (None if suffix == ".csv" else 9)


def test_a_history_that_cannot_be_is_an_error_of_one_line(runs, tmp_path, capsys):
    place = next((runs[0] / "a").iterdir())
    text = re.sub(
        r'"history": \{.*\}', '"history": {"rows": [3]}', (place / "state.json").read_text()
    )
    text = re.sub(r',\n  "sha256": "[0-9a-f]{64}"\n\}\n$', "", text)
    seal = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "state.json").write_text(f'{text},\n  "sha256": "{seal}"\n}}\n')
    assert main(["report", str(tmp_path)]) == 1
    assert "is damaged: its history cannot be read" in capsys.readouterr().err


def test_runs_of_one_epoch_are_drawn_by_step(tmp_path):
    trainer = Trainer(nn.Linear(3, 1), optim.SGD(0.1), "mse", batch_size=2, seed=0)
    options = {"log_every": 3, "validation_freq": "4 steps", "verbose": 0}
    history = trainer.fit((X, Y), (X, Y), checkpoint_dir=tmp_path / "a", **options)
    found = report(tmp_path / "a")
    trained, validated = (points(found, f"a, {s} loss") for s in ("training", "validation"))
    assert [place for place, _ in trained] == [row["step"] for row in history.steps]
    assert [place for place, _ in validated] == [4, 8, 12]
    np.testing.assert_allclose(
        [v for _, v in validated], [row["val_loss"] for row in history.evaluations], rtol=1e-4
    )
    final = found.rows("Final metrics")
    assert final["loss"] == [f"{history.last['loss']:.5g}"]  # of the epoch, not of some steps
    assert re.fullmatch(r"\S+ \(best \S+ at step \d+\)", final["val_loss"][0])
    log = Run(tmp_path, by_epoch={"loss": [(1, 2.0)]})
    assert common_axis([read_run(tmp_path / "a"), log]) == "epoch"


def test_several_validation_sets_belong_to_the_chart_of_their_value(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("epoch,loss,val_easy_loss,val_hard_loss,val_own\n0,1,2,3,4\n1,2,3,4,5\n")
    found = report(log)
    titles = [attrs["aria-label"] for tag, attrs in found.tags if attrs.get("role") == "img"]
    assert titles == ["loss", "own"]
    assert points(found, "log.csv, validation hard loss") == [(1, 3), (2, 4)]
    dashes = {a["class"] for t, a in found.tags if t == "g" and a["class"].startswith("c0")}
    assert dashes == {"c0 d0", "c0 d1", "c0 d2", "c0 d3"}


def test_text_is_escaped_and_nothing_is_loaded_or_run(tmp_path):
    log = tmp_path / "<script>alert(1)&amp;.jsonl"
    row = {"epoch": 0, "lo<b>ss": 1.0, 'x" onload="y': 2.0}
    log.write_text("".join(json.dumps(row | {"epoch": e}) + "\n" for e in range(2)))
    found = report(log)
    assert {tag for tag, _ in found.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "section", "div"),
        *("table", "thead", "tbody", "tr", "td", "th", "ul", "li", "figure", "figcaption", "p"),
        *("svg", "g", "line", "text", "polyline", "circle", "footer"),
    }
    names = {name for _, attrs in found.tags for name in attrs}
    assert not names & {"src", "href", "onload", "style"}
    assert log.name in found.tables["Runs"][0]
    assert "lo<b>ss" in found.rows("Final metrics")
    text = (tmp_path / "page" / "report.html").read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|url\(|@import", text)


def test_nan_is_a_gap_and_infinity_is_not_drawn(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("epoch,loss,bad\n0,3,inf\n1,nan,inf\n2,2,nan\n3,1,inf\n4,inf,inf\n")
    found = report(log)
    assert points(found, "log.csv, training loss") == [(1, 3), (3, 2), (4, 1)]
    lines = [attrs for tag, attrs in found.tags if tag == "polyline" and "," in attrs["points"]]
    assert [len(line["points"].split()) for line in lines][-1] == 2
    assert found.rows("Final metrics")["loss"] == ["inf (best 1 at epoch 4)"]
    for tag, attrs in found.tags:
        if tag in ("circle", "polyline", "line", "text"):
            assert not re.search("nan|inf", " ".join(map(str, attrs.values())))


def test_names_are_the_shortest_that_differ():
    paths = ["x/a/checkpoints", "x/b/checkpoints", "y/b/checkpoints", "y/b/log.csv", "y/b/log.csv"]
    runs = [Run(Path(path)) for path in paths]
    name_runs(runs)
    expected = ["a/checkpoints", "x/b/checkpoints", "y/b/checkpoints", "log.csv", "log.csv (2)"]
    assert [run.name for run in runs] == expected


def test_a_file_that_a_spreadsheet_saved_is_read(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("epoch;loss\r\n0;2.5\r\n1;2\r\n", encoding="utf-8-sig", newline="")
    assert read_run(log).by_epoch == {"loss": [(1, 2.5), (2, 2)]}


def test_a_log_that_is_still_written_is_read_up_to_its_last_whole_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"epoch": 0, "loss": null}\n{"epoch": 1, "loss": 2.0}\n{"epoch": 2, "lo')
    assert read_run(log).by_epoch["loss"][1:] == [(2, 2.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'epoch'"),
        ("step,loss\n1,2\n", "no column 'epoch' in the first line 'step,loss'"),
        ("epoch,loss\nx,2\n", ":2: the epoch is 'x'"),
        ('{"epoch": 1}\nrubbish\n', ":2: this is no JSON"),
        ('{"epoch": 1}\n[1]\n', ":2: expected an object"),
        ('{"epoch": NaN, "loss": 1}\n', ":1: expected an object with a number 'epoch'"),
        ('{"loss": 1}\n', ":1: expected an object with a number 'epoch'"),
    ],
)
def test_a_file_that_is_no_log_is_told_by_line(tmp_path, text, message, capsys):
    log = tmp_path / "log"
    log.write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        read_run(log)
    assert main(["report", str(log), "-o", str(tmp_path / "r.html")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_what_is_not_there_is_told(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 1
    assert "holds no checkpoint; expected a checkpoint" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 1
    assert "No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["report"])


def test_the_page_can_be_printed(runs, capsys):
    assert main(["report", str(runs[0] / "a.csv"), "-o", "-"]) == 0
    assert Page(capsys.readouterr().out).rows("Runs")["epochs"] == ["3"]


def test_a_log_without_rows_is_a_page_without_curves(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("epoch,loss\n")
    assert set(report(log).tables) == {"Runs"}


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0, 1], [3, 3], [0, 0], [-1e-9, 1e-9], [0.1, 7e4], [-5e99, 1]])
def test_ticks_are_round_few_and_within_the_axis(values):
    axis = Axis(values, 200, 10)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(9 <= axis.at(tick) <= 201 for tick in ticks)
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert float(f"{steps[0]:.0e}") == pytest.approx(steps[0])


def test_a_wide_range_of_positive_values_has_a_logarithmic_axis():
    wide, narrow = [(1, 1e-4), (2, 1.0), (3, 100.0)], [(1, 0.5), (2, 1.0)]
    assert "logarithmic" in chart("x", [Curve("x", wide, 0)], "epoch")
    assert "logarithmic" not in chart("x", [Curve("x", narrow, 0)], "epoch")
    axis = Axis([1e-4, 100.0], 0, 60, is_log=True)
    assert axis.at(0.1) == pytest.approx(30)
    assert axis.ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100])


def test_a_long_curve_is_thinned_and_keeps_its_peaks():
    values = np.sin(np.arange(10**5) / 500)
    values[61_803], values[30_001] = 9.0, -9.0
    long = list(enumerate(values.tolist()))
    kept = thinned(long)
    assert len(kept) <= MOST
    assert {(61_803, 9.0), (30_001, -9.0)} < set(kept)
    assert kept == sorted(kept)
    assert set(kept) < set(long)


def test_more_runs_than_colours_still_give_a_page():
    runs = [Run(Path("x"), name=f"run {i}", by_epoch={"loss": [(1, i), (2, i)]}) for i in range(11)]
    assert Page(page(runs)).tables["Final metrics"][0][1:] == [run.name for run in runs]
