"""Real ranks over MLX's ring that die, freeze, raise or lose their link: nobody hangs."""

import os
import select
import socket
import threading
import time

import pytest
from control_ranks import CONT, KILL, STOP, TERM, Ranks, free_ports, is_alive


def test_a_killed_rank_is_lost_on_all_others(tmp_path):
    with Ranks(tmp_path, 4, fault={"rank": 2, "step": 3, "kind": "kill"}) as ranks:
        assert ranks.end() == [75, 75, -KILL, 75]
        for rank in (0, 1, 3):
            error = ranks[rank].error
            assert (error["error"], error["rank"], error["step"]) == ("PeerLostError", 2, 3)
            assert ranks[rank].steps[-1] == 3  # no further collective
        assert not any(is_alive(rank.process.pid) for rank in ranks.ranks)


def test_rank_0_may_be_the_killed_one(tmp_path):
    with Ranks(tmp_path, 3, fault={"rank": 0, "step": 3, "kind": "kill"}) as ranks:
        assert ranks.end() == [-KILL, 75, 75]
        assert [ranks[r].error["rank"] for r in (1, 2)] == [0, 0]


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_lost_after_the_timeout(tmp_path, frozen):
    other = 1 - frozen
    with Ranks(tmp_path, 2, timeout=1.5, steps=10_000, pause=0.02) as ranks:
        ranks[other].wait_for(20)
        ranks[frozen].kill(STOP)
        stopped = time.time()
        assert ranks.end(other) == [75]
        error = ranks[other].error
        assert (error["error"], error["rank"]) == ("PeerLostError", frozen)
        assert "no sign of life" in error["cause"]
        assert 0.9 < error["at"] - stopped < 30  # and not for ever
        ranks[frozen].kill(CONT)  # it finds out as well, and leaves
        assert ranks.end(frozen) == [75]


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_exception_of_a_rank_is_named_on_the_others(tmp_path, culprit):
    with Ranks(tmp_path, 3, fault={"rank": culprit, "step": 3, "kind": "raise"}) as ranks:
        assert ranks.end() == [1, 1, 1]
        text = ranks[culprit].err.read_text()
        assert text.rstrip().endswith("ValueError: boom")
        for rank in {0, 1, 2} - {culprit}:
            error = ranks[rank].error
            assert error["error"] == "PeerError"
            assert (error["rank"], error["step"]) == (culprit, 3)
            assert (error["type"], error["message"]) == ("ValueError", "boom")


def test_an_exception_that_nobody_reported_is_named_when_it_ends_the_process(tmp_path):
    with Ranks(tmp_path, 2, fault={"rank": 1, "step": 3, "kind": "unreported"}) as ranks:
        assert ranks.end() == [1, 1]
        assert (ranks[0].error["type"], ranks[0].error["message"]) == ("KeyError", "'boom'")


def test_a_preempted_rank_makes_the_others_leave_with_143(tmp_path):
    with Ranks(tmp_path, 2, fault={"rank": 1, "step": 3, "kind": "preempted"}) as ranks:
        assert ranks.end() == [143, 143]
        assert ranks[0].error["type"] == "Preempted"


def test_a_rank_that_finished_early_is_missed(tmp_path):
    with Ranks(tmp_path, 2, fault={"rank": 1, "step": 3, "kind": "exit"}) as ranks:
        assert ranks.end() == [75, 0]
        assert ranks[0].error["error"] == "PeerLostError"
        assert "finished" in ranks[0].error["cause"]


def test_a_slow_rank_is_no_fault(tmp_path):
    fault = {"rank": 1, "step": 3, "kind": "sleep", "seconds": 2.5}
    with Ranks(tmp_path, 2, timeout=1, fault=fault) as ranks:
        assert ranks.end() == [0, 0]


@pytest.mark.parametrize("frozen", [0, 1])
def test_sigterm_ends_a_rank_that_waits_for_a_frozen_one(tmp_path, frozen):
    other = 1 - frozen
    fault = {"handler": True}  # as Trainer.fit has one: it only notes the signal
    with Ranks(tmp_path, 2, timeout=60, steps=10_000, pause=0.02, fault=fault) as ranks:
        ranks[other].wait_for(5)
        ranks[frozen].kill(STOP)
        time.sleep(0.5)
        start = time.monotonic()
        ranks[other].kill(TERM)
        assert ranks.end(other) == [143]
        assert time.monotonic() - start < 30  # half the timeout; a moment on a calm machine
        assert ranks[other].error["error"] == "Preempted"


def test_sigterm_does_not_end_a_collective_among_healthy_ranks(tmp_path):
    fault = {"handler": True, "rank": 1, "step": 10, "kind": "sleep", "seconds": 2.5}
    with Ranks(tmp_path, 2, steps=15, pause=0.02, fault=fault) as ranks:
        ranks[0].wait_for(10)
        ranks[0].kill(TERM)  # its handler notes it, and the run would stop in order
        assert ranks.end() == [0, 0]


class Relay(threading.Thread):
    """Carries one TCP connection between two ports, until it is told to stop or to break."""

    def __init__(self, to):
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", free_ports(1)[0]))
        self.port, self.to = self.listener.getsockname()[1], to
        self.is_silent = self.is_broken = False
        self.bytes_per_second = 1e9
        self.start()

    def run(self):
        near = self.listener.accept()[0]
        while True:
            try:
                far = socket.create_connection(("127.0.0.1", self.to))
                break
            except OSError:
                time.sleep(0.05)
        with near, far, self.listener:
            while not self.is_broken:
                for sock in select.select([near, far], [], [], 0.05)[0]:
                    while self.is_silent and not self.is_broken:
                        time.sleep(0.02)
                    if not self.is_broken and (data := sock.recv(1 << 16)):
                        time.sleep(len(data) / self.bytes_per_second)
                        (far if sock is near else near).sendall(data)
                    else:
                        return


def relayed(tmp_path, **options):
    """Two ranks, with a relay from rank 0 to rank 1."""
    ports = free_ports(2)
    relay = Relay(ports[1])
    hosts = [[f"127.0.0.1:{port}"] for port in ports]
    ranks = Ranks(
        tmp_path, 2, hostfiles=[[hosts[0], [f"127.0.0.1:{relay.port}"]], hosts], **options
    )
    return relay, ranks


def test_a_broken_link_between_living_ranks_ends_both(tmp_path):
    relay, ranks = relayed(tmp_path, steps=10_000, pause=0.02)
    with ranks:
        ranks[0].wait_for(10)
        relay.is_broken = True
        assert ranks.end() == [75, 75]
        errors = [ranks[rank].error for rank in (0, 1)]
        assert [error["error"] for error in errors] == ["PeerLostError"] * 2
        assert [error["rank"] for error in errors] == [1, 0]
        assert "connection between ranks" in errors[0]["cause"]


def test_a_silent_link_between_living_ranks_times_out(tmp_path):
    relay, ranks = relayed(tmp_path, steps=10_000, pause=0.02, timeout=1)
    with ranks:
        ranks[0].wait_for(20)
        relay.is_silent = True
        assert ranks.end() == [75, 75]
        errors = [ranks[rank].error for rank in (0, 1)]
        assert [error["error"] for error in errors] == ["CollectiveTimeoutError"] * 2
        assert "none moves" in errors[0]["text"]
    relay.is_broken = True


def test_a_large_sum_that_takes_longer_than_the_timeout_is_no_fault(tmp_path):
    """What moves is not stuck."""
    if not os.path.exists("/proc/self"):
        pytest.skip("only Linux tells how much a socket has received")
    relay, ranks = relayed(tmp_path, steps=1, timeout=1, length=500_000)
    relay.bytes_per_second = 1_000_000
    with ranks:
        start = time.monotonic()
        ranks[0].wait_for(0)
        assert ranks.end() == [0, 0]
        assert time.monotonic() - start > 2.0
