"""DeviceConfig: checked when made, applied for a while, and put back."""

import dataclasses

import mlx.core as mx
import pytest

from mlx_fit.errors import ConfigurationError, DeviceError
from mlx_fit.runtime.device import DeviceConfig, available

has_gpu = mx.is_available(mx.gpu)


def current():
    """Device and limits as MLX has them now."""
    limits = []
    for set_limit in (mx.set_memory_limit, mx.set_cache_limit):
        limits.append(set_limit(1 << 30))
        set_limit(limits[-1])
    return [str(mx.default_device()), *limits]


def test_limits_hold_inside_and_are_put_back():
    before = current()
    with DeviceConfig(device="cpu", memory_limit="3GB", cache_limit=4096).applied():
        assert current() == ["Device(cpu, 0)", 3_000_000_000, 4096]
    assert current() == before


def test_limits_are_put_back_after_an_exception():
    before = current()
    with pytest.raises(KeyError), DeviceConfig(memory_limit="1GiB", cache_limit=0).applied():
        raise KeyError
    assert current() == before


def test_nothing_given_changes_nothing():
    before = current()
    with DeviceConfig().applied():
        assert current() == before


def test_a_cache_limit_of_0_keeps_no_freed_memory():
    with DeviceConfig(device="cpu", cache_limit=0).applied():
        mx.clear_cache()
        array = mx.zeros((1 << 18,)) + 1
        mx.eval(array)
        del array
        mx.eval(mx.zeros((8,)) + 1)  # the cache is trimmed with an allocation
        assert mx.get_cache_memory() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu, reason="needs a GPU")
def test_the_device_is_the_one_asked_for():
    for name in ("gpu", "cpu"):
        with DeviceConfig(device=name).applied():
            assert mx.default_device().type.name == name


@pytest.mark.skipif(has_gpu, reason="needs an MLX without a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_what_is():
    with pytest.raises(DeviceError, match=r"device='gpu' is not there: this MLX .* has cpu \("):
        DeviceConfig(device="gpu")


@pytest.mark.parametrize("device", ["cuda", "GPU", mx.cpu, 0])
def test_an_unknown_device_is_refused_with_the_names(device):
    with pytest.raises(ConfigurationError, match="is not a device: use 'cpu', 'gpu', or None"):
        DeviceConfig(device=device)


@pytest.mark.skipif(mx.metal.is_available(), reason="needs an MLX without Metal")
def test_a_wired_limit_without_metal_is_refused_as_it_has_no_effect():
    with pytest.raises(ConfigurationError, match="wired_limit='8GB' has no effect without Metal"):
        DeviceConfig(wired_limit="8GB")


def test_a_wired_limit_on_metal_is_set_and_put_back(monkeypatch):
    wired = [100]

    def set_wired_limit(limit):
        wired.append(limit)
        return wired[-2]

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    with DeviceConfig(wired_limit="1KB").applied():
        assert wired[-1] == 1000
    assert wired == [100, 1000, 100]


@pytest.mark.parametrize("argument", ["memory_limit", "cache_limit", "wired_limit"])
def test_a_limit_that_is_no_size_is_refused_by_name(argument):
    with pytest.raises(ConfigurationError, match=f"{argument}='lots' is not a size"):
        DeviceConfig(**{argument: "lots"})


def test_no_memory_at_all_is_refused():
    with pytest.raises(ConfigurationError, match="memory_limit='0GB' leaves no memory"):
        DeviceConfig(memory_limit="0GB")


def test_a_configuration_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DeviceConfig().device = "cpu"


def test_the_cpu_is_among_the_available_devices():
    assert any(name.startswith("cpu (") for name in available())
