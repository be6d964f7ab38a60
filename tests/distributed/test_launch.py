"""What ``mlx-fit launch`` starts, shows and returns."""

import json
import os
import subprocess
import sys

import pytest
from control_ranks import ENVIRONMENT, LOOP

from mlx_fit.cli import main
from mlx_fit.distributed.backends import surroundings
from mlx_fit.distributed.hosts import Host, read_hosts, seat
from mlx_fit.distributed.launch import Job, launch
from mlx_fit.errors import ConfigurationError


def call(*arguments):
    """The exit code of ``mlx-fit launch``, run in this process."""
    return main(["launch", *arguments])


def shell(text):
    return ("--", "sh", "-c", text)


def test_each_rank_finds_itself_in_the_environment(capfd):
    text = 'echo "$MLX_RANK $(cat $MLX_HOSTFILE) $MLX_FIT_CONTROL $MLX_FIT_TOKEN $MLX_FIT_RESTART"'
    assert call("-n", "3", "--output", "merged", *shell(text)) == 0
    rows = sorted(line.rsplit(" ", 3) for line in capfd.readouterr().out.splitlines())
    heads = [row[0].split(" ", 1) for row in rows]
    assert [head[0] for head in heads] == ["0", "1", "2"]
    rings = [json.loads(head[1]) for head in heads]
    assert rings[0] == rings[1] == rings[2]
    ports = {address.split(":")[1] for addresses in rings[0] for address in addresses}
    ports.add(rows[0][1].split(":")[1])
    assert len(ports) == 4
    assert {tuple(row[1:]) for row in rows} == {(rows[0][1], rows[0][2], "0")}
    assert len(rows[0][2]) == 32


def test_one_rank_alone_is_no_ring(capfd, monkeypatch):
    """MLX's ring of one waits for itself."""
    monkeypatch.setenv("MLX_RANK", "5")
    assert call("-n", "1", *shell('echo "<$MLX_RANK$MLX_HOSTFILE>"')) == 0
    assert capfd.readouterr().out == "[0] <>\n"


def test_ranks_run_mlx_over_its_ring_and_a_py_file_needs_no_interpreter():
    command = [sys.executable, "-m", "mlx_fit.cli", "launch", "-n", "2", str(LOOP), '{"steps": 3}']
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=30, stdin=None
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        rows = [line for line in done.stdout.splitlines() if line.startswith(f"[{rank}] ")]
        assert [json.loads(row[4:]).get("step") for row in rows] == [0, 1, 2, None]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("exit 0", 0),
        ("exit $MLX_RANK", 1),
        ("exit $((MLX_RANK * 3))", 3),
        ("exit $((MLX_RANK * 75))", 75),
        ("exit $((MLX_RANK * 143))", 143),
        ("[ $MLX_RANK = 0 ] || kill -9 $$", 75),
        ("[ $MLX_RANK = 0 ] || kill -TERM $$", 143),
    ],
)
def test_exit_codes_are_true(text, code):
    assert call("-n", "2", *shell(text)) == code


def test_a_rank_that_failed_ends_the_others(capfd, monkeypatch):
    monkeypatch.setattr("mlx_fit.distributed.launch._END_SECONDS", 0.3)
    text = "[ $MLX_RANK = 0 ] && exit 4; exec sleep 1000"
    assert call("-n", "3", *shell(text)) == 4
    assert "rank 0 ended with exit code 4" in capfd.readouterr().err


def test_the_traceback_of_the_rank_that_failed_is_the_last_word(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_fit.distributed.launch._END_SECONDS", 60)
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys, time\n"
        "if os.environ['MLX_RANK'] == '1': time.sleep(0.5); raise KeyError('mine')\n"
        "print('mlx_fit.errors.PeerError: Rank 1 raised', file=sys.stderr); sys.exit(1)\n"
    )
    assert call("-n", "2", str(script)) == 1
    err = capfd.readouterr().err
    assert err.rstrip().endswith("KeyError: 'mine'")
    assert "mlx-fit launch: the last of rank 1:\nTraceback" in err


def test_lines_keep_their_rank_and_stream(capfd):
    text = 'printf "a\\nb"; printf "c\\rd" >&2; sleep 0.1; printf "e\\n"'
    assert call("-n", "2", *shell(text)) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[0] a", "[0] be", "[1] a", "[1] be"]
    lines = err.replace("\r", "\n").splitlines()
    assert sorted(lines) == ["[0] c", "[0] d", "[1] c", "[1] d"]


def test_logs_hold_what_each_rank_printed_and_rank_0_may_be_shown_alone(capfd, tmp_path):
    text = "echo out $MLX_RANK; echo err >&2"
    logs = tmp_path / "deep" / "logs"
    assert call("-n", "2", "--output", "rank0", "--log-dir", str(logs), *shell(text)) == 0
    assert capfd.readouterr() == ("out 0\n", "err\n")
    for rank in (0, 1):
        lines = (logs / f"rank_{rank}.log").read_text().splitlines()
        assert sorted(lines) == ["err", f"out {rank}"]


def test_a_full_disk_ends_a_log_and_not_the_run(capfd, tmp_path):
    (tmp_path / "rank_0.log").symlink_to("/dev/full")
    assert call("-n", "2", "--log-dir", str(tmp_path), *shell("echo out $MLX_RANK")) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[0] out 0", "[1] out 1"]
    assert err.count("rank_0.log ends here (No space left on device); the run goes on.") == 1
    assert (tmp_path / "rank_1.log").read_text() == "out 1\n"


def test_much_output_arrives_whole(capfd):
    text = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done"
    assert call("-n", "2", "--output", "merged", *shell(text)) == 0
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == sorted(f"line {i}" for i in range(3000) for _ in range(2))


def test_variables_are_given_to_all_ranks(capfd):
    assert call("-n", "2", "--env", "A=b=c", "--env", "E=", *shell('echo "$A<$E>"')) == 0
    assert capfd.readouterr().out.count("b=c<>") == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("-n", "2"), "no command"),
        (("-n", "0", "--", "true"), "-n 0"),
        (("-n", "2", "nowhere.py"), "no file nowhere.py"),
        (("-n", "2", "--", "no-such-program"), "cannot run 'no-such-program'"),
        (("-n", "2", "--min-ranks", "3", "--", "true"), "min_ranks=3"),
        (("-n", "2", "--min-ranks", "0", "--", "true"), "min_ranks=0"),
        (("--max-restarts", "-1", "--", "true"), "max_restarts=-1"),
        (("--grace", "nan", "--", "true"), "grace=nan"),
        (("--env", "A", "--", "true"), "--env A"),
        (("--hosts", "a,,b", "--", "true"), "names of machines"),
        (("--hosts=-oProxyCommand=x", "--", "true"), "names of machines"),
        (("--hosts", "/nowhere/hosts", "--", "true"), "no such file"),
        (("--port", "70000", "--", "true"), "port=70000"),
        (("-n", "2", "--backend", "mpi", "--min-ranks", "1", "--", "true"), "mpirun does not tell"),
        (("-n", "2", "--backend", "jaccl", "--", "true"), "rdma"),
        (("--hosts", "no.such.host.invalid,localhost", "--", "true"), "host"),
        (("-n", "2", "--", "/"), "cannot run '/'"),
        (("-n", "2", "--log-dir", "/proc/x", "--", "true"), "log_dir='/proc/x': /proc/x cannot be"),
        (("-n", "2", "--log-dir", __file__, "--", "true"), "test_launch.py cannot be written"),
        (("-n", "2", "--log-dir", "/proc", "--", "true"), "/proc/rank_0.log cannot be written"),
        (("--log-dir", "", "--", "true"), "--log-dir is empty"),
        (("--hosts", "", "--", "true"), "names of machines"),
        (("--hosts", sys.executable, "--", "true"), "cannot be read (it is no text)"),
        (("--env", "MLX_RANK=7", "--", "true"), "the launcher sets it. Leave it out"),
        (("--python", "/nowhere/python", __file__), "cannot run '/nowhere/python'"),
        (("--hosts", "far", "--ssh", "/nowhere/ssh", "--", "true"), "cannot run '/nowhere/ssh'"),
        (("--hosts", "far", "--ssh", "ssh '", "--", "true"), "is no command"),
    ],
)
def test_wrong_usage_is_2_and_says_why(arguments, text, capfd, monkeypatch):
    """In one line, before any process is started where this machine can tell."""
    monkeypatch.setattr(subprocess, "Popen", None)
    assert call(*arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith("mlx-fit launch: ")
    assert err.count("\n") == 1
    assert text in err
    assert "Traceback" not in err


def test_unknown_options_are_argparses_2():
    with pytest.raises(SystemExit, match="2"):
        call("--backend", "smoke", "--", "true")


def test_a_closed_standard_input_is_no_trouble():
    command = [sys.executable, "-m", "mlx_fit.cli", "launch", "-n", "2", "--", "echo", "hi"]
    line = '"$@" <&-'
    done = subprocess.run(
        ["sh", "-c", line, "sh", *command], env=ENVIRONMENT, capture_output=True, timeout=30
    )
    assert (done.returncode, done.stdout.count(b"hi")) == (0, 2)


def test_nobody_reading_the_output_ends_nothing(tmp_path):
    text = "for i in 1 2 3 4 5 6; do echo $i; sleep 0.1; done; echo done >> " + str(
        tmp_path / "end"
    )
    command = [sys.executable, "-m", "mlx_fit.cli", "launch", "-n", "2", *shell(text)]
    read, write = os.pipe()
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=write)
    os.close(read)
    os.close(write)
    assert process.wait(30) == 0
    assert (tmp_path / "end").read_text().count("done") == 2


def test_host_files_of_both_kinds_are_read(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two machines\nmini1 slots=2  # fast\n\n10.0.0.2\n")
    hosts = read_hosts(str(path))
    assert [(host.name, host.ips) for host in hosts] == [("mini1", ()), ("10.0.0.2", ("10.0.0.2",))]
    assert [host.name for host in seat(hosts, None)] == ["mini1", "mini1", "10.0.0.2"]
    assert [host.name for host in seat(hosts, 4)] == ["mini1", "mini1", "10.0.0.2", "10.0.0.2"]
    path.write_text('{"backend": "ring", "hosts": [{"ssh": "a", "ips": ["10.0.0.1"]}]}')
    assert read_hosts(str(path)) == [Host("a", ("10.0.0.1",))]
    of_text = '[{"ssh": "a", "ips": "10.0.0.1"}]'
    for text in ("[1]", "{}", "[", "a b", "a slots=0", "", of_text):
        path.write_text(text)
        with pytest.raises(ConfigurationError):
            read_hosts(str(path))


def test_backends_find_what_mlx_launch_sets_for_them():
    hosts = [Host("a", ("10.0.0.1",)), Host("a", ("10.0.0.1",)), Host("b", ("10.0.0.2",))]
    ring = surroundings("ring", hosts, 32323)
    addresses = [["10.0.0.1:32323"], ["10.0.0.1:32324"], ["10.0.0.2:32325"]]
    assert [json.loads(rank.files["MLX_HOSTFILE"]) for rank in ring] == [addresses] * 3
    assert ring[2].variables == {"MLX_RANK": "2", "MLX_FIT_CONTROL": "10.0.0.1:32326"}
    nccl = [rank.variables for rank in surroundings("nccl", hosts, 32323)]
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in nccl] == ["0", "1", "0"]
    assert {(r["NCCL_HOST_IP"], r["NCCL_PORT"], r["MLX_WORLD_SIZE"]) for r in nccl} == {
        ("10.0.0.1", "32323", "3")
    }
    macs = [Host("a", ("10.0.0.1",), (None, "en2")), Host("b", ("10.0.0.2",), ("en2", None))]
    jaccl = surroundings("jaccl", macs, 32323)
    assert jaccl[1].variables["MLX_JACCL_COORDINATOR"] == "10.0.0.1:32323"
    assert json.loads(jaccl[0].files["MLX_IBV_DEVICES"]) == [[None, "en2"], ["en2", None]]


def test_mpirun_is_given_the_number_the_variables_and_the_command(tmp_path, monkeypatch, capfd):
    """A stand-in prints what it was given; the real one is not everywhere."""
    fake = tmp_path / "mpirun"
    fake.write_text('#!/bin/sh\nprintf "%s " "$@"\nexit 7\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert call("-n", "3", "--backend", "mpi", "--env", "A=b", "--", "prog", "x") == 7
    out = capfd.readouterr().out
    assert out.startswith("[0] -n 3 ")
    assert " -x A=b " in out
    assert " -x MLX_FIT_CONTROL=127.0.0.1:" in out
    assert out.rstrip().endswith(" -- prog x")


def test_mpi_without_mpirun_says_what_to_install(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call("-n", "2", "--backend", "mpi", "--", "true") == 2
    assert "openmpi-bin" in capfd.readouterr().err


def test_a_job_is_checked_where_it_is_made():
    with pytest.raises(ConfigurationError, match="backend='smoke'"):
        Job(["true"], [Host("localhost")], backend="smoke")
    with pytest.raises(ConfigurationError, match="output='loud'"):
        Job(["true"], [Host("localhost")], output="loud")


def test_launch_puts_signal_handlers_back():
    import signal

    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
    before = [signal.getsignal(name) for name in names]
    assert launch(Job(["true"], [Host("localhost")])) == 0
    assert [signal.getsignal(name) for name in names] == before
