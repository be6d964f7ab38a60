"""Kill a training run again and again, resume it each time, and compare its end with one unkilled.

    python tests/soak.py --kills 300

Three ways to die: SIGKILL at a random moment, SIGKILL at a given file operation of a save (each
stage of it in turn), and SIGTERM at a random moment. The parent imports the library without
computing anything and forks, so that a run costs milliseconds; ``--fresh`` starts interpreters.

Prints ``N kills, M resumes, D differences`` and exits with 1 if D is not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from resuming import Run, differences

from mlx_fit import CheckpointPolicy, Preempted
from mlx_fit.checkpoint import arrays, store

EPOCHS = 4
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
PARTS = ("random_key", "optimizer", "position", "callbacks")


def train(directory, background, keep, result=None, leave_out=None, every="3 steps"):
    """One life of the run: go on from what is there, to the end if nobody kills it."""
    warnings.simplefilter("ignore")
    if leave_out:
        forget(leave_out)
    policy = CheckpointPolicy(every, keep_last=keep, background=background)
    run = Run(directory, loader=True, epochs=EPOCHS, trainer={"gradient_accumulation": 2})
    saving = {"resume": "auto", "checkpoint_every": policy} if directory else {}
    try:
        run.go(**saving)
    except Preempted:
        os._exit(143)
    outcome = {k: v.hex() if isinstance(v, bytes) else v for k, v in run.outcome().items()}
    if result is not None:
        staged = Path(f"{result}.part")
        staged.write_text(json.dumps(outcome))
        staged.rename(result)


def forget(part):
    """The negative control: a resume that leaves one ingredient out."""
    read = store.read_checkpoint

    def incomplete(path):
        state = read(path)
        if part == "random_key":
            state.trainer["random_key"] = [0, 1]
        elif part == "optimizer":
            state.trainer["optimizer"] = {
                k: v * 0 if v.ndim else v for k, v in state.trainer["optimizer"].items()
            }
        elif part == "position":
            state.position["feed"]["source"]["loader"]["samples_consumed"] = 0
        else:
            state.callbacks = {}
        return state

    store.read_checkpoint = incomplete


def die_at(number, directory):
    """Let this process be killed at its n-th file operation in a folder, or half-way in a write."""
    count = 0

    def watch(event, args):
        nonlocal count
        if event in FILE_EVENTS and str(args[0]).startswith(str(directory)):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    append = arrays._append

    def half(file, digest, data):
        nonlocal count
        count += 1
        if count == number:
            file.write(bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return append(file, digest, data)

    arrays._append = half


def life(fresh, how, options):
    """Start one life and end it as ``how`` says; its exit status."""
    if fresh:
        code = f"import soak; soak.begin({how!r}, {options!r})"
        child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
        pid = child.pid
    elif (pid := os.fork()) == 0:
        try:
            begin(how, options)
        finally:
            os._exit(1)
    kind, value = how
    if kind in ("SIGKILL", "SIGTERM"):
        time.sleep(value)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, kind))
    if fresh:
        return child.wait()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def begin(how, options):
    if how[0] == "event":
        die_at(how[1], options["directory"])
    train(**options)
    os._exit(0)


class Soak:
    """Counts over many runs of one configuration."""

    def __init__(self, seed=0, fresh=False, leave_out=None):
        self.random = random.Random(seed)
        self.fresh = fresh
        self.leave_out = leave_out
        self.kills = self.resumes = self.runs = 0
        self.differences = []
        self.expected = None
        self.seconds = 0.0  # how long a run takes that nobody kills

    def check(self, background, keep, ends):
        """One run to its end, killed as each of ``ends`` says, as far as it gets."""
        with tempfile.TemporaryDirectory() as folder:
            directory, result = Path(folder) / "checkpoints", Path(folder) / "result.json"
            options = {
                "directory": str(directory),
                "background": background,
                "keep": keep,
                "result": str(result),
                "leave_out": self.leave_out,
            }
            directory.mkdir()
            (directory / "notes.txt").write_text("mine")
            for how in ends:
                status = life(self.fresh, how, options)
                if status == 0:
                    break
                if status not in (-signal.SIGKILL, -signal.SIGTERM, 143):
                    self.differences.append(f"exit status {status} after {how}")
                    return
                self.kills += 1
                self.resumes += 1
            else:
                if (status := life(self.fresh, ("none", 0), options)) != 0:
                    self.differences.append(f"exit status {status} without a kill")
                    return
            self.runs += 1
            self.compare(directory, json.loads(result.read_text()), ends)

    def compare(self, directory, outcome, ends):
        wrong = differences(outcome, self.reference())
        if wrong:
            self.differences.append(f"{wrong} after {ends}")
        if (directory / "notes.txt").read_text() != "mine":
            self.differences.append("a user's file was touched")
        left = [path.name for path in directory.iterdir() if path.name.startswith(".")]
        if left:
            self.differences.append(f"left over: {left}")

    def reference(self):
        if self.expected is None:
            with tempfile.TemporaryDirectory() as folder:
                result = f"{folder}/result.json"
                options = {"directory": None, "background": True, "keep": 1, "result": result}
                start = time.perf_counter()
                assert life(self.fresh, ("none", 0), options) == 0
                self.seconds = time.perf_counter() - start
                self.expected = json.loads(Path(result).read_text())
        return self.expected

    def random_ends(self):
        """A few deaths at random moments."""
        self.reference()
        low, high = (0.3 * self.seconds, self.seconds) if self.fresh else (0.0, 0.12)
        kind = "SIGTERM" if self.random.random() < 0.5 else "SIGKILL"
        return [(kind, self.random.uniform(low, high)) for _ in range(self.random.randint(1, 6))]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", type=int, default=0, help="first die at each of N operations")
    parser.add_argument("--first-stage", type=int, default=1, help="the first of them")
    parser.add_argument("--fresh", action="store_true", help="start interpreters instead of forks")
    parser.add_argument("--leave-out", choices=PARTS, help="negative control")
    arguments = parser.parse_args(argv)
    soak = Soak(arguments.seed, arguments.fresh, arguments.leave_out)
    for number in range(arguments.first_stage, arguments.stages + 1):
        for background in (True, False):
            soak.check(background, keep=1 + number % 3 // 2, ends=[("event", number)])
    at_random = soak.kills + arguments.kills
    while soak.kills < at_random and len(soak.differences) < 20:
        background, keep = soak.random.random() < 0.5, soak.random.choice([1, 2, None])
        soak.check(background, keep, soak.random_ends())
    for text in soak.differences:
        print(text)
    print(f"{soak.kills} kills, {soak.resumes} resumes, {len(soak.differences)} differences")
    return 1 if soak.differences else 0


if __name__ == "__main__":
    sys.exit(main())
