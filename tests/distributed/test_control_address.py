"""Where the control plane finds rank 0, what plans differ in, and what messages are."""

import json
import socket

import pytest

from mlx_fit.distributed.environment import Address, control_address, control_token
from mlx_fit.distributed.frames import Connection, Garbage, encode
from mlx_fit.distributed.plans import canonical, first_difference
from mlx_fit.distributed.ring_sockets import RingSockets
from mlx_fit.errors import ConfigurationError


def ring(tmp_path, *addresses):
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps([[address] for address in addresses]))
    return {"MLX_HOSTFILE": str(path), "MLX_RANK": "0"}


def test_mlx_launchs_host_file_tells_where_rank_0_is(tmp_path):
    environ = ring(tmp_path, "10.0.0.1:32323", "10.0.0.2:32324")
    assert str(control_address(environ)) == "10.0.0.1:33323"


def test_the_derived_port_is_none_of_the_rings(tmp_path):
    environ = ring(tmp_path, "10.0.0.1:65000", "10.0.0.2:1488", "10.0.0.3:2488")
    assert control_address(environ).port == 3488


@pytest.mark.parametrize(
    ("environ", "address"),
    [
        ({"MLX_FIT_CONTROL": "[fe80::1]:5", "NCCL_HOST_IP": "10.0.0.1"}, "[fe80::1]:5"),
        ({"NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "12345"}, "10.0.0.1:13345"),
        ({"MLX_JACCL_COORDINATOR": "10.0.0.1:32323"}, "10.0.0.1:33323"),
    ],
)
def test_other_launchers_are_understood(environ, address):
    assert str(control_address(environ)) == address


def test_mpi_on_one_machine_needs_no_address_and_on_more_it_does():
    local = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "7"}
    address = control_address(local)
    assert address == control_address(local) != control_address({**local, "PMIX_NAMESPACE": "8"})
    assert (address.host, control_token(local)) == ("127.0.0.1", "7")
    with pytest.raises(ConfigurationError, match="mpirun -x MLX_FIT_CONTROL"):
        control_address({**local, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


def test_a_host_file_that_is_none_is_an_error(tmp_path):
    path = tmp_path / "hosts.json"
    for text in ("{", "[[5]]", '[["nowhere"]]', "5"):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match="MLX_HOSTFILE"):
            control_address({"MLX_HOSTFILE": str(path)})


def test_the_first_difference_of_two_plans():
    plan = {"a": 1, "b": {"x": [1, 2], "y": ["u", "v"]}}
    assert first_difference(plan, json.loads(json.dumps(plan))) is None
    for other, difference in [
        ({**plan, "a": 2}, ("a", "1", "2")),
        ({"a": 1}, ("b", '{"x": [1, 2], "y": ["u", "v"]}', "nothing")),
        ({**plan, "c": 0}, ("c", "nothing", "0")),
        ({**plan, "b": {"x": [1], "y": ["u", "v"]}}, ("b.x", "[1, 2]", "[1]")),
        ({**plan, "b": {"x": [1, 2], "y": ["u"]}}, ("b.y[1]", "v", "nothing")),
        ({**plan, "b": 3}, ("b", '{"x": [1, 2], "y": ["u", "v"]}', "3")),
    ]:
        assert first_difference(plan, other) == difference
    assert canonical({1: (2, float)}) == {"1": [2, "<class 'float'>"]}


def pair():
    ours, theirs = socket.socketpair()
    return Connection(ours), theirs


def test_messages_arrive_whole_however_they_are_cut():
    connection, other = pair()
    text = encode({"kind": "a", "text": "ä" * 100}) + encode({"kind": "b"})
    found = []
    for byte in text:
        other.send(bytes([byte]))
        found += connection.receive()
    assert [message["kind"] for message in found] == ["a", "b"]
    other.send(text)
    other.close()
    assert [message["kind"] for message in connection.receive()] == ["a", "b"]
    with pytest.raises(EOFError):
        connection.receive()
    connection.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n",
        b"\0\0\0\2{}",
        b"\0\0\0\2[]",
        b"\0\0\0\4{\xff\xff}",
        b"\xff\xff\xff\xff",
    ],
)
def test_garbage_is_told_from_messages(garbage):
    connection, other = pair()
    other.send(garbage)
    with pytest.raises(Garbage):
        connection.receive()
    connection.close()
    other.close()


def test_a_reader_that_does_not_read_blocks_nobody():
    connection, other = pair()
    connection.limit = 1 << 30
    connection.send({"kind": "a", "text": "x" * (4 << 20)})
    assert connection.is_behind
    other.close()
    connection.flush()
    assert not connection.is_behind
    connection.close()


def test_only_the_rings_own_connections_are_cut():
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [listener.getsockname()[1] for listener in listeners]
    right = socket.create_connection(("127.0.0.1", ports[1]))
    far = socket.create_connection(("127.0.0.1", ports[2]))
    left = socket.create_connection(("127.0.0.1", ports[0]))
    mine = listeners[0].accept()[0]
    sockets = RingSockets([[Address("127.0.0.1", port)] for port in ports], 0)
    left.sendall(b"twelve bytes")
    if sockets.num_received():
        assert sockets.num_received() == 12
    assert sockets.broken_neighbour() is None
    left.close()
    mine.recv(12)
    assert sockets.broken_neighbour() == 2
    assert sockets.cut() == 2
    assert right.recv(1) == b""
    assert mine.recv(1) == b""
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    for sock in (right, far, mine, *listeners):
        sock.close()
