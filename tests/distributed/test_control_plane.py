"""Ranks that meet, agree and finish; and those that do not come or want something else."""

import json
import socket
import threading
import time

import pytest
from control_ranks import Ranks, free_ports

from mlx_fit.distributed.control import ControlPlane
from mlx_fit.errors import ConfigurationError, PlanMismatchError, RendezvousError

PLAN = {"seed": 0, "parameters": {"l1.weight": ["float32", [64, 8]], "l2.bias": ["float32", [3]]}}


def meet(plans, address=None, init_timeout=30.0, **arguments):
    """Ranks as threads of this process: what each ``join`` raised, or None."""
    address = address or f"127.0.0.1:{free_ports(1)[0]}"
    ends = [None] * len(plans)
    planes = [
        ControlPlane(r, len(plans), init_timeout=init_timeout, address=address, **arguments)
        for r in range(len(plans))
    ]

    def join(rank):
        try:
            planes[rank].join(plans[rank])
        except Exception as error:
            ends[rank] = error

    threads = [threading.Thread(target=join, args=(r,)) for r, p in enumerate(plans) if p]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    for plane in planes:
        plane.close()
    return ends


def test_four_ranks_meet_sum_and_end(tmp_path):
    with Ranks(tmp_path, 4, steps=5) as ranks:
        assert ranks.end() == [0, 0, 0, 0]
        assert [ranks[r].steps for r in range(4)] == [[0, 1, 2, 3, 4]] * 4


def test_a_group_of_one_opens_no_socket_and_starts_no_thread(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    before = threading.active_count()
    control = ControlPlane(0, 1)
    control.join(PLAN)
    with control.watching(0, "gradients"):
        assert threading.active_count() == before
    control.report(ValueError(), 0)
    control.close()


def test_equal_plans_are_accepted_whatever_types_they_are_written_in():
    plan = {"shape": (64, 8), "dtype": json.JSONEncoder, "rate": float("nan")}
    assert meet([plan, {**plan, "shape": [64, 8]}, plan]) == [None] * 3


def test_the_first_difference_is_named_on_all_ranks():
    other = json.loads(json.dumps(PLAN))
    other["parameters"]["l1.weight"][1] = [65, 8]
    other["parameters"]["l2.bias"][1] = [4]
    errors = meet([PLAN, PLAN, other])
    assert [type(error) for error in errors] == [PlanMismatchError] * 3
    assert {error.first for error in errors} == {"parameters.l1.weight[1]"}
    assert {(*error.ranks, *error.values) for error in errors} == {(0, 2, "[64, 8]", "[65, 8]")}
    assert "is [64, 8] on rank 0 and [65, 8] on rank 2" in str(errors[1])


def test_another_order_of_parameters_is_a_difference():
    turned = {**PLAN, "parameters": dict(reversed(PLAN["parameters"].items()))}
    assert "order" in meet([PLAN, turned])[0].first


def test_another_number_of_ranks_is_a_difference():
    address = f"127.0.0.1:{free_ports(1)[0]}"
    ends = {}

    def join(rank, size):
        with pytest.raises(PlanMismatchError, match="number of ranks is 2 on rank 0 and 3") as e:
            ControlPlane(rank, size, init_timeout=5, address=address).join(PLAN)
        ends[rank] = e.value.first

    threads = [threading.Thread(target=join, args=pair) for pair in ((0, 2), (1, 3))]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert ends == {0: "number of ranks", 1: "number of ranks"}


@pytest.mark.parametrize("here", [(0,), (1,), (0, 2), (1, 2)], ids=str)
def test_missing_ranks_are_named_in_time(here):
    start = time.monotonic()
    ends = meet([PLAN if rank in here else None for rank in range(3)], init_timeout=1.0)
    assert 0.9 < time.monotonic() - start < 30
    # Without rank 0 nobody knows more than that.
    missing = sorted({0, 1, 2} - set(here)) if 0 in here else [0]
    for rank in here:
        assert isinstance(ends[rank], RendezvousError)
        assert ends[rank].missing == missing
        assert "of 3 did not arrive" in str(ends[rank])


def test_a_missing_rank_ends_the_process_with_75(tmp_path):
    with Ranks(tmp_path, 2, started=[0], init_timeout=1) as ranks:
        assert ranks.end() == [75]
        assert ranks[0].error["missing"] == [1]
        assert "rank 1 of 2 did not arrive" in ranks[0].err.read_text()


def test_a_mismatch_ends_the_processes_with_1(tmp_path):
    with Ranks(tmp_path, 2, plan={"0": {"hidden": 64}, "1": {"hidden": 65}}) as ranks:
        assert ranks.end() == [1, 1]
        assert [ranks[r].error["first"] for r in (0, 1)] == ["hidden", "hidden"]


def test_strangers_are_ignored_before_and_during_the_meeting():
    port = free_ports(1)[0]
    garbage = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00\x00\x02{}",
        b"\xff" * 9,
        b"",
        b"\0\0\0\x04[[[[",
    ]
    hello = {"kind": "hello", "protocol": 1, "token": "other", "rank": 1, "size": 2, "digest": ""}
    text = json.dumps(hello).encode()
    garbage.append(len(text).to_bytes(4, "big") + text)
    over, strangers = threading.Event(), []

    def disturb():
        while not over.wait(0.01):
            for what in garbage:
                try:
                    strangers.append(socket.create_connection(("127.0.0.1", port)))
                    strangers[-1].sendall(what)
                except OSError:
                    pass

    thread = threading.Thread(target=disturb)
    thread.start()
    time.sleep(0.1)
    try:
        assert meet([PLAN, PLAN], address=f"127.0.0.1:{port}") == [None, None]
    finally:
        over.set()
        thread.join()
        [stranger.close() for stranger in strangers]


def test_a_second_process_of_a_rank_is_refused():
    address = f"127.0.0.1:{free_ports(1)[0]}"
    ends = []

    def join(rank):
        try:
            ControlPlane(rank, 3, init_timeout=1.5, address=address).join(PLAN)
        except RendezvousError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1, 1)]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert sum("another process is rank 1 already" in end for end in ends) == 1
    assert sum("rank 2 of 3 did not arrive" in end for end in ends) == 2


def test_tokens_keep_runs_apart(monkeypatch):
    address = f"127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv("MLX_FIT_TOKEN", "one")
    first = ControlPlane(0, 2, init_timeout=1, address=address)
    monkeypatch.setenv("MLX_FIT_TOKEN", "two")
    second = ControlPlane(1, 2, init_timeout=1, address=address)
    ends = []

    def join(plane):
        with pytest.raises(RendezvousError) as info:
            plane.join(PLAN)
        ends.append(str(info.value))

    threads = [threading.Thread(target=join, args=(plane,)) for plane in (first, second)]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert len(ends) == 2
    assert any("Something answers there" in end for end in ends)


def test_ranks_meet_over_ipv6():
    with socket.socket(socket.AF_INET6) as sock:
        try:
            sock.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
    assert meet([PLAN, PLAN], address=f"[::1]:{free_ports(1)[0]}") == [None, None]


def test_a_used_address_is_an_error_that_names_the_variable():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        control = ControlPlane(0, 2, init_timeout=0.2, address=f"127.0.0.1:{sock.getsockname()[1]}")
        with pytest.raises(RendezvousError, match="MLX_FIT_CONTROL=HOST:PORT"):
            control.join(PLAN)


def test_the_same_object_meets_again_after_it_was_closed():
    address = f"127.0.0.1:{free_ports(1)[0]}"
    planes = [ControlPlane(rank, 2, init_timeout=5, address=address) for rank in (0, 1)]
    met = []

    def meet(plane, number):
        plane.join({"n": number})
        met.append(number)

    for number in range(3):
        threads = [threading.Thread(target=meet, args=(plane, number)) for plane in planes]
        [thread.start() for thread in threads]
        [thread.join(20) for thread in threads]
        for plane in planes:
            with plane.watching(0, "nothing"):
                pass
    assert met == [0, 0, 1, 1, 2, 2]
    for plane in planes:
        plane.close()
        plane.close()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((2, 2), "rank=2 with size=2"),
        ((-1, 2), "rank=-1"),
        ((0, 0), "size=0"),
        ((0, 2, 0.0), "timeout=0.0"),
        ((0, 2, 60, float("nan")), "init_timeout=nan"),
        ((0, 2, 60, 60, "somewhere"), "address='somewhere'"),
        ((0, 2, 60, 60, "host:0"), "address='host:0'"),
        ((0, 2), "Set MLX_FIT_CONTROL=HOST:PORT"),
    ],
)
def test_arguments_are_checked(arguments, text, monkeypatch):
    for name in ("MLX_FIT_CONTROL", "MLX_HOSTFILE", "NCCL_HOST_IP", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match=text):
        ControlPlane(*arguments)


def test_a_plan_is_a_mapping():
    with pytest.raises(ConfigurationError, match="plan="):
        ControlPlane(0, 1).join(["a"])
