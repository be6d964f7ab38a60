"""What takes a path says so, whatever it is given instead."""

import pytest
from toys import ramp, trainer_of

from mlx_fit import CSVLogger, JSONLogger, TensorBoard, Trainer
from mlx_fit.callbacks import Profiler
from mlx_fit.data import ImageFolder, open_arrays, read_csv
from mlx_fit.errors import ConfigurationError
from mlx_fit.text import TextDataset


class Letters:
    def encode(self, text, add_special_tokens=True):
        return [ord(letter) for letter in text]


@pytest.mark.parametrize("value", [3, 1.5, [], b"name"], ids=repr)
@pytest.mark.parametrize(
    "use",
    [
        read_csv,
        open_arrays,
        ImageFolder,
        CSVLogger,
        JSONLogger,
        TensorBoard,
        lambda value: Profiler(trace=value),
        lambda value: TextDataset([{"text": "abc"}], Letters(), cache_dir=value),
        lambda value: trainer_of().fit(ramp(1), checkpoint_dir=value, verbose=0),
        lambda value: trainer_of().fit(ramp(1), verbose=0).to_csv(value),
        lambda value: trainer_of().save(value),
        lambda value: trainer_of().load_weights(value),
    ],
)
def test_what_is_no_path_is_named_with_its_argument(use, value):
    with pytest.raises(ConfigurationError, match=r"\w+=.*expected a (path|folder)"):
        use(value)


def test_a_path_may_be_a_string_or_a_path(tmp_path):
    trainer = trainer_of()
    assert isinstance(trainer, Trainer)
    for path in (tmp_path / "a.safetensors", str(tmp_path / "b.safetensors")):
        trainer.save_weights(path)
    assert len(list(tmp_path.iterdir())) == 2
