"""A rank that sums ones for some steps under a control plane, with a fault on the way.

``python control_loop.py '{"steps": 20, "fault": {"rank": 1, "step": 3, "kind": "kill"}}'``
"""

import json
import os
import signal
import sys
import time

import mlx.core as mx

from mlx_fit import errors
from mlx_fit.distributed.control import ControlPlane


def say(**facts):
    print(json.dumps(facts), flush=True)


def misbehave(fault, rank, step):
    """What the fault is, at its step on its rank."""
    if fault.get("rank") != rank or fault.get("step") != step:
        return
    kind = fault["kind"]
    if kind in ("kill", "stop"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])
    elif kind == "raise":
        raise ValueError("boom")
    elif kind == "unreported":
        raise KeyError("boom")
    elif kind == "sleep":
        time.sleep(fault["seconds"])
    elif kind == "exit":
        sys.exit(fault.get("code", 0))
    elif kind == "preempted":
        raise errors.Preempted(step=step)
    else:
        raise AssertionError(kind)


def run(options, rank, size):
    control = ControlPlane(
        rank, size, options.get("timeout", 5), options.get("init_timeout", 10), options.get("at")
    )
    plan = options.get("plan", {})
    control.join(plan.get(str(rank), plan))
    group = mx.distributed.init(strict=True, backend="ring")
    ones = mx.ones(options.get("length", 1000))
    mx.eval(ones)
    fault = options.get("fault") or {}
    if fault.get("handler"):
        signal.signal(signal.SIGTERM, lambda *_: None)
    for step in range(options.get("steps", 10)):
        say(step=step, pid=os.getpid())
        try:
            misbehave(fault, rank, step)
        except (ValueError, errors.Preempted) as error:
            control.report(error, step)
            raise
        with control.watching(step, "gradients"):
            total = mx.distributed.all_sum(ones, group=group, stream=mx.cpu)
            mx.eval(total)
        assert total[0].item() == size, total[0]
        time.sleep(options.get("pause", 0.0))
    say(done=True)
    control.close()


def main():
    options = json.loads(sys.argv[1])
    try:
        run(options, int(os.environ["MLX_RANK"]), int(options.get("size", 2)))
    except errors.MlxFitError as error:
        facts = {k: v for k, v in vars(error).items() if not k.startswith("_")}
        say(error=type(error).__name__, at=time.time(), text=str(error), **facts)
        raise


if __name__ == "__main__":
    main()
