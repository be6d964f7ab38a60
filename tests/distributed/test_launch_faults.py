"""``mlx-fit launch`` when ranks, machines or the launcher itself are ended: no orphan, no hang."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from control_ranks import ENVIRONMENT, KILL, LOOP, STOP, TERM, free_ports, is_alive

from mlx_fit.distributed.outcome import Outcome, outcome_of

# A shell that "connects" to this machine; a host is gone once a file of its name exists.
REMOTE_SHELL = """#!/bin/sh
host=$1
[ -e {folder}/gone_$host ] && exit 255
exec 3<&0  # what runs in the background would read from nowhere
sh -c "$2" <&3 &
while kill -0 $! 2>/dev/null; do
  [ -e {folder}/gone_$host ] && exit 255
  sleep 0.05
done
wait $!
"""


class Launcher:
    """``mlx-fit launch`` in a process of its own, with all that it printed."""

    def __init__(self, folder, *arguments):
        self.out, self.folder = folder / "out", folder
        command = [sys.executable, "-m", "mlx_fit.cli", "launch", *arguments]
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in self.pids():
            if is_alive(pid):
                os.kill(pid, KILL)

    def text(self):
        return self.out.read_text()

    def pids(self):
        """Of all processes that wrote theirs into the folder."""
        return [int(path.name.partition("_")[2]) for path in self.folder.glob("pid_*")]

    def wait_for_pids(self, number):
        until = time.monotonic() + 60
        while len(self.pids()) < number:
            assert time.monotonic() < until, self.text()
            time.sleep(0.02)

    def end(self, within=60):
        return self.process.wait(within)

    def living(self):
        """Which of them run after a moment."""
        until = time.monotonic() + 15
        while (alive := [pid for pid in self.pids() if is_alive(pid)]) and time.monotonic() < until:
            time.sleep(0.02)
        return alive


def shell(folder, text, first=":"):
    """A rank that does something first, leaves its process number, then does the rest."""
    return ("--", "sh", "-c", f"{first}; > {folder}/pid_$$; {text}")


@pytest.fixture
def remote(tmp_path):
    """Options for machines that are this one behind a remote shell."""
    script, hosts = tmp_path / "remote_shell", tmp_path / "hosts.json"
    script.write_text(REMOTE_SHELL.format(folder=tmp_path))
    script.chmod(0o755)
    hosts.write_text(json.dumps([{"ssh": name, "ips": ["127.0.0.1"]} for name in "abc"]))
    port = str(min(free_ports(4)))
    return ("--hosts", str(hosts), "--ssh", str(script), "--port", port)


def test_sigterm_is_passed_on_and_the_stubborn_are_killed_with_their_children(tmp_path):
    text = (
        "if [ $MLX_RANK = 0 ]; then trap 'exit 143' TERM; else trap '' TERM; fi; "
        f"(trap '' TERM; exec sh -c '> {tmp_path}/pid_$$; sleep 1000; :') & "
        "while :; do sleep 0.05; done"
    )
    with Launcher(tmp_path, "-n", "2", "--grace", "0.5", *shell(tmp_path, text)) as launcher:
        launcher.wait_for_pids(4)
        launcher.process.send_signal(TERM)
        assert launcher.end() == 143
        assert not launcher.living()


def test_ranks_that_end_in_order_after_sigterm_are_a_success(tmp_path):
    rank = shell(tmp_path, "while :; do sleep 0.05; done", first="trap 'exit 0' TERM")
    with Launcher(tmp_path, "-n", "2", *rank) as launcher:
        launcher.wait_for_pids(2)
        launcher.process.send_signal(TERM)
        assert launcher.end() == 0


def test_a_first_ctrl_c_is_passed_on_and_waited_for_a_second_ends_the_ranks(tmp_path):
    trap = f"trap '> {tmp_path}/pid_999999999' INT"
    rank = shell(tmp_path, "while :; do sleep 0.05; done", first=trap)
    with Launcher(tmp_path, "-n", "1", *rank) as launcher:
        launcher.wait_for_pids(1)
        launcher.process.send_signal(signal.SIGINT)
        launcher.wait_for_pids(2)
        assert launcher.process.poll() is None
        launcher.process.send_signal(signal.SIGINT)
        assert launcher.end() == 130
        assert not launcher.living()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_local_ranks_die_with_a_killed_launcher(tmp_path):
    with Launcher(tmp_path, "-n", "2", *shell(tmp_path, "exec sleep 1000")) as launcher:
        launcher.wait_for_pids(2)
        launcher.process.kill()
        launcher.end()
        assert not launcher.living()


def test_remote_ranks_die_with_a_killed_launcher(tmp_path, remote):
    with Launcher(tmp_path, *remote, *shell(tmp_path, "exec sleep 1000")) as launcher:
        launcher.wait_for_pids(3)
        launcher.process.kill()
        launcher.end()
        assert not launcher.living()


def test_a_frozen_rank_does_not_outlive_the_others(tmp_path):
    text = "[ $MLX_RANK = 0 ] && { sleep 0.5; exit 75; }; kill -STOP $$"
    with Launcher(tmp_path, "-n", "2", "--grace", "0.3", *shell(tmp_path, text)) as launcher:
        assert launcher.end() == 75
        assert not launcher.living()


def test_a_lost_rank_is_a_restart_of_all_and_a_failed_one_is_not(tmp_path):
    lost = "[ $MLX_FIT_RESTART = 2 ] || [ $MLX_RANK = 0 ] || kill -9 $$"
    with Launcher(tmp_path, "-n", "2", "--max-restarts", "3", *shell(tmp_path, lost)) as launcher:
        assert launcher.end() == 0
        assert launcher.text().count("rank 1 was ended by SIGKILL; starting again with 2") == 2
        assert len(launcher.pids()) == 6
    folder = tmp_path / "second"
    folder.mkdir()
    with Launcher(folder, "-n", "2", "--max-restarts", "3", *shell(folder, "exit 1")) as launcher:
        assert launcher.end() == 1
        assert len(launcher.pids()) == 2


def test_remote_ranks_get_their_environment_and_return_their_codes(tmp_path, remote):
    text = 'echo "$MLX_RANK of $(cat $MLX_HOSTFILE)"; exit $((MLX_RANK * 2))'
    options = (*remote, "--env", "A=it's")
    with Launcher(tmp_path, *options, *shell(tmp_path, f'echo "$A"; {text}')) as launcher:
        assert launcher.end() in (2, 4)
        printed = launcher.text()
        assert printed.count("it's") == 3
        assert "[2] 2 of [[" in printed
        assert not list(tmp_path.glob("mlx_hostfile*"))


def test_remote_ranks_are_told_to_end(tmp_path, remote):
    first = "trap 'echo told; exit 143' TERM"
    rank = shell(tmp_path, "while :; do sleep 0.05; done", first)
    with Launcher(tmp_path, *remote, "--grace", "20", *rank) as launcher:
        launcher.wait_for_pids(3)
        launcher.process.send_signal(TERM)
        assert launcher.end() == 143
        assert launcher.text().count("told") == 3
        assert not launcher.living()


def test_survivors_start_again_without_the_machine_that_is_gone(tmp_path, remote):
    text = (
        "if [ $MLX_FIT_RESTART = 0 ]; then "
        f"[ $MLX_RANK = 1 ] && > {tmp_path}/gone_b; exec sleep 1000; fi; "
        'echo "rank $MLX_RANK of $(cat $MLX_HOSTFILE)"'
    )
    options = (*remote, "--max-restarts", "1", "--min-ranks", "2", "--grace", "0.5")
    with Launcher(tmp_path, *options, *shell(tmp_path, text)) as launcher:
        assert launcher.end() == 0, launcher.text()
        printed = launcher.text()
        assert "rank 1 could not be reached any more; starting again with 2 ranks" in printed
        lines = [line for line in printed.splitlines() if "] rank" in line]
        assert len(lines) == 2
        assert len(json.loads(lines[0].partition(" of ")[2])) == 2
        assert not launcher.living()


def test_too_few_survivors_are_not_started(tmp_path, remote):
    (tmp_path / "gone_a").touch()
    with Launcher(tmp_path, *remote, "--max-restarts", "5", *shell(tmp_path, ":")) as launcher:
        assert launcher.end() == 75
        assert "only 2 ranks left; 3 needed" in launcher.text()


def test_ranks_behind_a_remote_shell_sum_over_the_ring(tmp_path, remote):
    with Launcher(tmp_path, *remote, str(LOOP), '{"steps": 2, "size": 3}') as launcher:
        assert launcher.end() == 0, launcher.text()
        assert launcher.text().count('"done": true') == 3


def test_a_frozen_machine_learning_rank_is_replaced_by_a_restart(tmp_path):
    """Heartbeats, typed error, exit code and restart together."""
    options = {"steps": 60, "timeout": 1, "pause": 0.02}
    script = tmp_path / "train.py"
    script.write_text(
        "import json, os, sys\n"
        f"sys.path.insert(0, {str(LOOP.parent)!r})\n"
        "import control_loop\n"
        f"options = {options!r}\n"
        "if os.environ['MLX_FIT_RESTART'] == '0':\n"
        "    options['fault'] = {'rank': 1, 'step': 50, 'kind': 'stop'}\n"
        "sys.argv[1:] = [json.dumps(options)]\n"
        "control_loop.main()\n"
    )
    arguments = ("-n", "2", "--max-restarts", "1", "--grace", "0.5", str(script))
    with Launcher(tmp_path, *arguments) as launcher:
        assert launcher.end() == 0, launcher.text()
        printed = launcher.text()
        assert "PeerLostError: Rank 1 was lost at step 50" in printed
        assert "asks to be started again (exit code 75); starting again with 2" in printed
        assert printed.count('"done": true') == 2


class Ended:
    def __init__(self, rank, code, at=0.0, was_told=False, is_host_gone=False):
        self.rank, self.code, self.ended_at = rank, code, at
        self.was_told, self.is_host_gone = was_told, is_host_gone


@pytest.mark.parametrize(
    ("ranks", "code", "rank", "may_restart"),
    [
        ([(0, 0), (1, 0)], 0, None, False),
        ([(0, 75, 1), (1, 1, 2)], 1, 1, False),
        ([(0, 1, 2), (1, -KILL, 1)], 75, 1, True),
        ([(0, 5, 1), (1, -signal.SIGSEGV, 2)], 5, 0, False),
        ([(0, -signal.SIGABRT, 1), (1, 3, 2)], 3, 1, False),
        ([(0, -KILL, 2, True), (1, 4, 1)], 4, 1, False),
        ([(0, 143, 1), (1, 75, 2)], 143, 0, False),
        ([(0, -TERM, 1), (1, 143, 2)], 143, 0, False),
        ([(0, 75, 1), (1, -KILL, 9, True)], 75, 0, True),
        ([(0, 75, 1), (1, -STOP, 9, True, True)], 75, 1, True),
        ([(0, 1, 3), (1, 255, 1, False, True)], 75, 1, True),
    ],
    ids=str,
)
def test_codes_mean_together(ranks, code, rank, may_restart):
    outcome = outcome_of([Ended(*facts) for facts in ranks])
    assert (outcome.code, outcome.rank, outcome.may_restart) == (code, rank, may_restart)


def test_a_launcher_that_was_asked_to_stop_does_not_restart():
    assert outcome_of([Ended(0, -KILL)], TERM) == Outcome(143, "ended by SIGTERM")
    assert outcome_of([Ended(0, 0)], TERM).code == 0


@pytest.fixture
def machines(tmp_path):
    """Options for two network namespaces with a cable, and what pulls it."""
    a, b = (f"mlxfit{os.getpid()}{side}" for side in "ab")
    lines = [f"ip netns add {a}", f"ip netns add {b}"]
    lines += [f"ip link add veth0 netns {a} type veth peer name veth0 netns {b}"]
    for number, name in enumerate((a, b), 1):
        lines += [f"ip netns exec {name} ip addr add 10.77.0.{number}/24 dev veth0"]
        lines += [f"ip netns exec {name} ip link set {link} up" for link in ("veth0", "lo")]
    script, hosts = tmp_path / "remote_shell", tmp_path / "hosts.json"
    script.write_text('#!/bin/sh\nexec ip netns exec $1 sh -c "$2"\n')
    script.chmod(0o755)
    addresses = ("10.77.0.1", "10.77.0.2")
    rows = [{"ssh": name, "ips": [ip]} for name, ip in zip((a, b), addresses, strict=True)]
    hosts.write_text(json.dumps(rows))
    try:
        made = all(shutil.which("ip") and run_line(line) == 0 for line in lines)
        if not made:
            pytest.skip("network namespaces are not allowed here")
        yield (
            ("--hosts", str(hosts), "--ssh", str(script)),
            lambda: run_line(f"ip netns exec {b} ip link set veth0 down"),
        )
    finally:
        for name in (a, b) if shutil.which("ip") else ():
            run_line(f"ip netns del {name}")


def run_line(line):
    return subprocess.run(line.split(), capture_output=True, timeout=10).returncode


def test_a_pulled_cable_between_two_machines_ends_both(tmp_path, machines):
    options, pull = machines
    loop = json.dumps({"steps": 100_000, "pause": 0.02, "timeout": 1})
    with Launcher(tmp_path, *options, str(LOOP), loop) as launcher:
        until = time.monotonic() + 20
        while '"step": 20' not in launcher.text() and time.monotonic() < until:
            time.sleep(0.05)
        assert pull() == 0
        assert launcher.end() == 75
        printed = launcher.text()
        for rank, other in ((0, 1), (1, 0)):
            lines = [line for line in printed.splitlines() if line.startswith(f"[{rank}] mlx_fit")]
            assert f"PeerLostError: Rank {other} was lost" in lines[-1], printed
