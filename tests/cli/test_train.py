"""``mlx-fit train``: what a file says is what is trained."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_fit import Trainer, schedules
from mlx_fit.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
CODE = """
import mlx.nn as nn
import numpy as np
from mlx_fit import Callback, DataLoader

net = nn.Linear(4, 2)


def make(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


def rows(count=40, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    return x, (x.sum(1) > 0).astype(np.int32)


def parts():
    return {"train": rows(), "validation": rows(20, 1), "test": rows(10, 2)}


def stream(count):
    yield from [rows(8)] * count


class Rows:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        x, y = rows()
        return x[index], y[index]


class Module:
    def train_dataloader(self):
        return DataLoader(Rows(), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


class Announce(Callback):
    def __init__(self, word="epoch"):
        self.word = word

    def on_epoch_end(self, epoch, logs):
        print(f"<{self.word} {epoch}>")


def loss(outputs, targets):
    return nn.losses.cross_entropy(outputs, targets)


class Tok:
    eos_token_id = 0

    def encode(self, text, **options):
        return [ord(letter) % 50 + 1 for letter in text]


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 8)
        self.head = nn.Linear(8, 64)

    def __call__(self, tokens):
        return self.head(self.embedding(tokens))


def halved(row, rng):
    return row[0] / 2, row[1]


def breaks():
    raise RuntimeError("no luck")
"""
BASE = """
loss = "cross_entropy"
data = "mine_code.py:parts"
[model]
use = "mine_code.py:make"
[optimizer]
use = "Adam"
learning_rate = 0.01
[fit]
epochs = 2
batch_size = 8
seed = 0
verbose = 0
"""
TEXT = """
objective = "CausalLM"
model = { use = "mine_code.py:LanguageModel" }
optimizer = { use = "Adam", learning_rate = 0.01 }
[data.train]
use = "BucketBatches"
batch_size = 4
dataset = { use = "TextDataset", source = "t.jsonl", tokenizer = { use = "mine_code.py:Tok" } }
[fit]
verbose = 0
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a file of settings and the code that it names, in which commands run."""
    monkeypatch.syspath_prepend(tmp_path)  # and away again
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mine_code", raising=False)
    (tmp_path / "mine_code.py").write_text(CODE)
    (tmp_path / "base.toml").write_text(BASE)
    rows = [json.dumps({"text": f"hello {n}"}) + "\n" for n in range(10)]
    (tmp_path / "t.jsonl").write_text("".join(rows))
    return tmp_path


def train(*changes, config="base.toml", options=()):
    """The exit code of ``mlx-fit train`` with keys set."""
    pairs = [word for change in changes for word in ("--set", change)]
    return main(["train", config, *pairs, *options])


def table_of(capsys):
    """The rows of the closing table."""
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    return {row[1].strip(): row[2].strip() for row in rows}


# --- the whole ------------------------------------------------------------------------------------


def test_the_example_runs_and_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train("fit.epochs=4", "fit.verbose=0", config=str(EXAMPLES / "digits.toml")) == 0
    rows = table_of(capsys)
    assert rows["trained"] == "92 updates, 4 epochs"
    assert float(rows["val_accuracy"].split()[0]) > 0.85
    assert rows["checkpoints"] == "runs/digits/checkpoints"
    assert (tmp_path / "runs" / "digits" / "best.safetensors").is_file()
    assert len((tmp_path / "runs" / "digits" / "history.csv").read_text().splitlines()) == 5


def test_the_bits_are_those_of_the_same_python(place):
    shutil.copy(EXAMPLES / "digits_net.py", place)
    shutil.copy(EXAMPLES / "digits.toml", place)
    changes = ("fit.epochs=2", "fit.verbose=0", "callbacks.EarlyStopping=false")
    assert train(*changes, config="digits.toml") == 0
    from digits_net import Net

    from mlx_fit import datasets

    mx.random.seed(0)
    rate = schedules.warmup_cosine(4e-3, 340, 20)
    optimizer = optim.AdamW(rate, weight_decay=0.01)
    trainer = Trainer(Net(128), optimizer, "cross_entropy", ["accuracy"], batch_size=64, seed=0)
    trainer.fit(datasets.digits(), validation_split=0.2, epochs=2, verbose=0)
    found = Trainer(Net(128), optim.AdamW(rate))
    found.load(place / "runs" / "digits" / "checkpoints")
    for name, array in nn.utils.tree_flatten(trainer.model.parameters()):
        other = dict(nn.utils.tree_flatten(found.model.parameters()))[name]
        assert mx.array_equal(array, other), name


def test_it_goes_on_where_it_was(place, capsys):
    once = ("fit.checkpoint_dir=a", 'fit.resume="auto"', "callbacks.JSONLogger.path=a.jsonl")
    assert train(*once) == 0
    assert train(*once, "fit.epochs=5") == 0
    assert table_of(capsys)["trained"] == "25 updates, 5 epochs"
    whole = ("fit.checkpoint_dir=b", "callbacks.JSONLogger.path=b.jsonl", "fit.epochs=5")
    assert train(*whole) == 0

    def losses(name):
        rows = map(json.loads, (place / name).read_text().splitlines())
        return [row["loss"] for row in rows if row["event"] == "epoch"]

    assert losses("a.jsonl") == losses("b.jsonl")
    assert len(losses("a.jsonl")) == 5


def test_a_folder_with_checkpoints_is_not_overwritten_by_accident(place, capsys):
    assert train("fit.checkpoint_dir=a") == 0
    assert train("fit.checkpoint_dir=a") != 0
    assert "resume" in capsys.readouterr().err


def test_a_dry_run_shows_layers_plan_and_a_batch_and_trains_nothing(place, capsys):
    assert train("fit.checkpoint_dir=a", options=["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "layers.0" in out
    assert "Memory of a training step, batch of 8" in out
    assert "A batch: x: (8, 4) float32, y: (8,) int32" in out
    assert not (place / "a").exists()


def test_the_table_has_the_best_and_the_test_values(place, capsys):
    assert train("metrics=['accuracy']", "callbacks.CSVLogger.filename=c.csv") == 0
    rows = table_of(capsys)
    assert "(best: " in rows["val_accuracy"]
    assert 0 <= float(rows["test accuracy"]) <= 1
    assert rows["curves"] == "c.csv"
    assert "stopped by" not in rows


def test_counts_are_whole_and_matrices_and_facts_of_the_machine_are_left_out(place, capsys):
    assert train("metrics=['confusion_matrix']", "callbacks.DeviceMonitor=true") == 0
    assert not {"confusion_matrix", "val_confusion_matrix", "cpu_percent"} & {*table_of(capsys)}
    (place / "own.toml").write_text(TEXT)
    assert train(config="own.toml") == 0
    assert table_of(capsys)["num_tokens"].isdigit()


def test_why_it_stopped_is_said(place, capsys):
    assert train("fit.max_steps=3") == 0
    rows = table_of(capsys)
    assert (rows["stopped by"], rows["trained"]) == ("max_steps", "3 updates, 1 epoch")


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        ["model=mine_code.py:net"],
        ["model.width=3"],
        ["model=mine_code:net"],
        [
            'model={use = "Sequential", args = [{use = "Linear", input_dims = 4, '
            'output_dims = 2}, {use = "ReLU"}]}'
        ],
        ["loss=mine_code.py:loss"],
        ["loss={use = 'CrossEntropy', label_smoothing = 0.1}"],
        ["metrics=['accuracy', {use = 'F1'}]"],
        ["optimizer.learning_rate={use = 'cosine_decay', init = 0.1, decay_steps = 9}"],
        ["callbacks=['mine_code.py:Announce', {use = 'EMA', decay = 0.9}]"],
        ["callbacks.TerminateOnNaN=true", "callbacks.EMA=false"],
        ["data=mine_code.py:Module"],
        ["data=mine_code.py:rows"],
        ["data={train = {use = 'mine_code.py:rows', count = 16}}"],
        ["data={train = 'mine_code.py:Rows', validation = 'mine_code.py:rows'}"],
        ["data={train = {use = 'DataLoader', dataset = {use = 'mine_code.py:Rows'}}}"],
        ["data={train = {use = 'mine_code.py:stream', count = 3}}"],
        ["fit.device_config.device=cpu"],
        ["fit.checkpoint_dir=a", "fit.checkpoint_every.every=3 steps"],
        ["fit.strategy=zero1", "fit.sync.timeout=30"],
    ],
)
def test_what_can_be_named(place, changes, capsys):
    assert train(*changes) == 0
    assert "trained" in table_of(capsys)


def test_arguments_arrive(place, capsys):
    assert train("callbacks.own.use=mine_code.py:Announce", "callbacks.own.word=done") == 0
    assert "<done 0>" in capsys.readouterr().out


def test_an_objective_is_named_as_well(place):
    text = BASE.replace('loss = "cross_entropy"', "[objective]\nuse = 'Supervised'")
    text = text.replace('data = "mine_code.py:parts"', "loss = 'cross_entropy'")
    (place / "own.toml").write_text(text + "[data]\ntrain = 'mine_code.py:rows'\n")
    assert train(config="own.toml") == 0


def test_files_are_read_by_their_suffix(place, capsys):
    x = np.arange(24, dtype=np.float32).reshape(6, 4) / 24
    np.savez(place / "d.npz", x=x, y=np.arange(6) % 2)
    np.savez(place / "e.npz", images=x, labels=np.arange(6) % 2, w=np.ones(6, np.float32))
    lines = ["a,b,c,d,y", *(",".join(map(str, [*row, i % 2])) for i, row in enumerate(x))]
    (place / "f.csv").write_text("\n".join(lines) + "\n")
    (place / "f.tsv").write_text("\n".join(lines).replace(",", "\t") + "\n")
    parts = [
        "'d.npz'",
        "{use = 'e.npz', x = 'images', y = 'labels', weights = 'w'}",
        "{use = 'f.csv', target = 'y'}",
        "{use = 'f.tsv', target = 'y'}",
    ]
    found = []
    for part in parts:
        assert train(f"data={{train = {part}}}", "fit.shuffle=false") == 0
        found.append(table_of(capsys)["loss"])
    assert found == found[:1] * 4


def test_files_and_functions_are_arguments_as_well(place, capsys):
    lines = [f"{i / 9},{i % 4},{-i / 9},1,{i % 2}" for i in range(10)]
    (place / "f.csv").write_text("\n".join(["a,b,c,d,y", *lines]) + "\n")
    file, found = "{use = 'f.csv', target = 'y'}", []
    for part in (file, f"{{use = 'Map', dataset = {file}, f = 'mine_code.py:halved'}}"):
        part = f"{{use = 'DataLoader', batch_size = 5, shuffle = false, dataset = {part}}}"
        assert train(f"data={{train = {part}}}", "fit.epochs=1") == 0
        found.append(table_of(capsys)["loss"])
    assert found[0] != found[1]


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("fit.epoch=3", "fit: there is no setting 'epoch'. Did you mean 'epochs'?"),
        ("modle=3", "there is no setting 'modle'. Did you mean 'model'?"),
        ("model.widht=3", "has no argument 'widht'. Did you mean 'width'?"),
        ("model=mine_code.py:mak", "mine_code.py has no 'mak'. Did you mean 'make'?"),
        ("model=mine_cod.py:make", "Did you mean 'mine_code.py'?"),
        ("model=nowhere.at.all:make", "there is no module 'nowhere.at.all'"),
        ("model=mine_code.py:rows", "gives a tuple; expected a model"),
        ("model=make", "Your own are written as"),
        ("model={}", "there is no model"),
        ("model={width = 3}", "model: there is no use"),
        ("optimizer.use=AdamWW", "Did you mean 'AdamW'?"),
        ("optimizer.learning_rat=3", "Did you mean 'learning_rate'?"),
        ("optimizer={use = 'SGD'}", "missing a required argument: 'learning_rate'"),
        ("optimizer.betas=3", "optimizer: Adam:"),
        ("optimizer.learning_rate={use = 'warmup_cosine', peak = 1}", "'total_steps'"),
        ("loss=mes", "Did you mean 'mse'?"),
        ("loss.use=Hubr", "Did you mean 'Huber'?"),
        ("objective=CausalLM", "has both"),
        ("metrics=['acuracy']", "Did you mean 'accuracy'?"),
        ("callbacks.EarlyStoping.patience=3", "Did you mean 'EarlyStopping'?"),
        ("callbacks.EarlyStopping.patienc=3", "Did you mean 'patience'?"),
        ("callbacks.EarlyStopping.patience=x", "callbacks.EarlyStopping: EarlyStopping: patience"),
        ("callbacks.EarlyStopping=3", "expected a table"),
        ("callbacks=3", "expected a table"),
        ("data={train = 'rows.json'}", "is of no kind that is read here"),
        ("data={train = 'rows.csv'}", "there is no file"),
        ("data={train = {use = 'f.csv', path = 'g.csv'}}", "the file is f.csv already"),
        ("data={trian = 'digits'}", "Did you mean 'train'?"),
        ("data={validation = 'digits'}", "there is no train"),
        ("fit.epochs=x", "epochs='x'; expected an integer"),
        ("fit.seed=x", "seed='x'; expected an integer"),
        ("fit.batch_size=0", "batch_size=0"),
        ("fit.resume=true", "needs checkpoint_dir"),
        ("fit.verbose=9", "verbose=9"),
        ("fit.strategy=zer", "strategy='zer'"),
        ("fit.checkpoint_every.evry=3", "Did you mean 'every'?"),
        (
            "model={use = 'Sequential', args = [{use = 'Linear', args = [4, 2]}, 'ReLU']}",
            "model: Sequential is given the text 'ReLU', and MLX takes no names. What it stands "
            "for is written { use = 'ReLU' }",
        ),
        ("fit", "expected KEY=VALUE"),
        ("fit.epoch=", "there is no fit.epoch to leave out. Did you mean 'epochs'?"),
        ("fit.none.such=", "there is no fit.none.such to leave out"),
        ("fit.epochs.x=3", "epochs is 2, which has no keys"),
    ],
)
def test_wrong_usage_is_told_with_the_nearest_name(place, capsys, change, says):
    (place / "f.csv").write_text("a,y\n1,0\n")
    assert train(change) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("mlx-fit train: ")
    assert says in line


@pytest.mark.parametrize(
    ("text", "says"),
    [("x = [", "cannot be read as TOML"), ("", "there is no model"), (None, "No such file")],
)
def test_a_file_that_cannot_be_used_is_wrong_usage(place, capsys, text, says):
    if text is not None:
        (place / "own.toml").write_text(text)
    assert train(config="own.toml") == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model=mine_code.py:breaks", "RuntimeError: no luck"),
        ("optimizer.learning_rate=1e30", "The loss was"),
        ("callbacks.EarlyStopping.monitor=val_los", "EarlyStopping monitors 'val_los'"),
        ("data={train = 'bad.npz'}", "cannot be read as .npz"),
        ("data={train = 'array.npz'}", "cannot be read as .npz"),
        ("model=slip.py:make", "slip.py, line 1;"),
    ],
)
def test_a_run_that_fails_is_one_line_and_1(place, capsys, change, says):
    (place / "bad.npz").write_bytes(b"no zip")
    with (place / "array.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    (place / "slip.py").write_text("def make(:\n")
    assert train(change) == 1
    assert says in capsys.readouterr().err
    assert "mine_code.py, line" in says or "Traceback" not in capsys.readouterr().err


def test_the_line_of_a_failure_names_the_users_code_and_debug_shows_all(place, capsys):
    assert train("model=mine_code.py:breaks") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "mine_code.py, line" in line
    with pytest.raises(Exception, match="no luck") as caught:
        train("model=mine_code.py:breaks", options=["--debug"])
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_values_are_tomls_or_texts(place, capsys):
    assert train("fit.epochs = 1", "fit.class_weight={0 = 0.5}", "fit.checkpoint_dir=a b") == 0
    assert table_of(capsys)["trained"] == "5 updates, 1 epoch"
    assert (place / "a b").is_dir()


def announcing(place):
    """A configuration with a list of one callback."""
    callbacks = 'callbacks = [{ use = "mine_code.py:Announce", word = "a" }]\n'
    (place / "own.toml").write_text(callbacks + BASE)


def test_a_place_in_a_list_can_be_set(place, capsys):
    announcing(place)
    assert train("callbacks.0.word=b", config="own.toml") == 0
    assert "<b 0>" in capsys.readouterr().out
    assert train("callbacks.1.word=b", config="own.toml") == 2


def test_a_key_without_a_value_is_left_out(place, capsys):
    announcing(place)
    assert train("callbacks.0.word=", config="own.toml") == 0
    assert "<epoch 0>" in capsys.readouterr().out
    assert train("callbacks.0=", config="own.toml") == 0
    assert "<" not in capsys.readouterr().out
    assert train("optimizer.learning_rate=") == 2
    assert "missing a required argument: 'learning_rate'" in capsys.readouterr().err


def test_a_table_with_a_target_needs_no_code(place, capsys):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=40) for name in "abcd"} | {"y": np.arange(40) % 2}
    parquet.write_table(pa.table(columns), place / "rows.parquet")
    np.savez(
        place / "rows.npz",
        x=np.stack([columns[n] for n in "abcd"], 1).astype(np.float32),
        y=columns["y"],
    )
    found = []
    for part in ("{use = 'rows.parquet', target = 'y'}", "'rows.npz'"):
        assert train(f"data={{train = {part}}}", "fit.epochs=1") == 0
        found.append(table_of(capsys)["loss"])
    assert found[0] == found[1]
    assert train("data={train = 'rows.parquet'}", "fit.epochs=1") == 1
    assert "Read a table with target='its column'" in capsys.readouterr().err


def test_help_has_an_example_that_can_be_read(place, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    out = capsys.readouterr().out
    text = out[out.index('  loss = "cross_entropy"') : out.index("exit codes")]
    (place / "own.toml").write_text(text.replace("net.py:Net", "mine_code.py:make"))
    assert train("fit.epochs=0", "model={use = 'mine_code.py:make'}", config="own.toml") == 0
