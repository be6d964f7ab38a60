"""RemoteLogger, against a real server on this machine."""

import json
import threading
import time
import warnings
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from toys import Do, raising, ramp, trainer_of

from mlx_fit import ConfigurationError, RemoteLogger

LIMIT_SECONDS = 30  # of a fit on a busy machine, which takes a fraction of a second


@contextmanager
def server(status=200, gate=None):
    """A server that keeps what it is sent, (path, headers, body); it waits for an open gate."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if gate is not None:
                gate.wait(LIMIT_SECONDS)
            received.append((self.path, dict(self.headers), json.loads(body)))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{served.server_address[1]}/publish", received
        finally:
            served.shutdown()
            thread.join()


def fit(callback, **options):
    options = {"epochs": 2, "callbacks": callback, "verbose": 0} | options
    return trainer_of().fit(ramp(2), ramp(1), **options)


def nowhere():
    """A port that nobody listens on."""
    with server() as (url, _):
        return url


def test_events_arrive_in_order_with_their_values():
    with server() as (url, received):
        callback = RemoteLogger(url, headers={"X-Token": "t"})
        history = fit(callback)
    bodies = [body for _, _, body in received]
    assert [body["event"] for body in bodies] == [
        *("train_begin", "evaluation", "epoch", "evaluation", "epoch", "train_end")
    ]
    assert bodies[4]["logs"]["loss"] == history.history["loss"][1]
    assert (bodies[4]["epoch"], bodies[4]["step"]) == (1, 4)
    path, headers, _ = received[0]
    assert (path, headers["X-Token"], headers["Content-Type"]) == (
        "/publish",
        "t",
        "application/json",
    )
    assert (callback.num_sent, callback.num_failed) == (6, 0)


def test_a_server_that_is_not_there_is_one_warning_and_training_goes_on():
    url = nowhere()
    with pytest.warns(UserWarning, match="RemoteLogger could not send to") as caught:
        history = fit(RemoteLogger(url), epochs=3)
    assert len(caught) == 1
    assert history.epoch == [0, 1, 2]


def test_an_answer_that_is_an_error_is_one_warning():
    with server(status=500) as (url, received):
        callback = RemoteLogger(url)
        with pytest.warns(UserWarning, match="500") as caught:
            fit(callback)
    assert len(caught) == 1
    assert (len(received), callback.num_failed) == (6, 6)


def test_a_slow_server_does_not_hold_training_up():
    gate, before = threading.Event(), threading.active_count()
    with server(gate=gate) as (url, _):
        callback, start = RemoteLogger(url, timeout=0.05), time.perf_counter()
        with pytest.warns(UserWarning, match="could not send"):
            fit(callback)
        assert time.perf_counter() - start < LIMIT_SECONDS  # what one answer takes by then
        gate.set()
    while threading.active_count() > before:
        time.sleep(0.01)


def test_the_oldest_events_give_way_where_too_many_wait():
    gate = threading.Event()
    callback = RemoteLogger("http://127.0.0.1:9/x", max_queue=2, timeout=0.1)
    callback._send_all = lambda waiting: gate.wait(5)
    with pytest.warns(UserWarning, match="events were left"):
        fit(callback, epochs=3)
    gate.set()
    assert callback.num_failed >= 6


def test_it_can_serve_several_fits_and_threads_end():
    before = {*threading.enumerate()}
    with server() as (url, received):
        callback = RemoteLogger(url)
        for _ in range(2):
            fit(callback, epochs=1)
        assert [body["event"] for _, _, body in received].count("train_end") == 2
        breaks = Do("on_epoch_end", raising(OSError("lost")))
        with pytest.raises(OSError, match="lost"):
            fit([callback, breaks])
        assert received[-1][2] == {
            "event": "exception",
            "epoch": 0,
            "step": 2,
            "error": "OSError: lost",
        }
    assert {*threading.enumerate()} <= before  # those of other tests may end meanwhile


def test_nothing_is_sent_outside_of_fits():
    with server() as (url, received), warnings.catch_warnings():
        trainer_of().evaluate(ramp(1), callbacks=RemoteLogger(url), verbose=0)
    assert received == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "localhost:9000"}, "url='localhost:9000'"),
        ({"url": None}, "url=None"),
        ({"url": "ftp://x/y"}, "url="),
        ({"url": "http://host:port/x"}, "url="),
        ({"url": "http://:80"}, "url="),
        ({"headers": ["a"]}, r"headers=\['a'\]"),
        ({"headers": {"a": 1}}, "headers="),
        ({"timeout": 0}, "timeout=0"),
        ({"max_queue": 0}, "max_queue=0"),
    ],
)
def test_a_wrong_argument_is_named(options, says):
    with pytest.raises(ConfigurationError, match=f"RemoteLogger: {says}"):
        RemoteLogger(**({"url": "http://127.0.0.1:9/x"} | options))
