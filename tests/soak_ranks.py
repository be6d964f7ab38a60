"""Ranks that fail at random: each run ends in what was promised, none hangs, none is wrong.

python tests/soak_ranks.py --rounds 100 [--seed 0], or ``make soak-ranks``. A lost, frozen or cut
off rank is followed by a restart, which must end with the bits of a run without any fault; so must
a run that goes on after SIGTERM. An exception, a lack of memory, NaN and a full disk end all
ranks with exit code 1 and leave checkpoints from which a run goes on to the same bits.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
LIMIT_SECONDS = 90
# Fault -> exit code of the launcher, which may restart once; 0 means that it had to, or no need.
FAULTS = {
    "kill": 0,
    "stop": 0,
    "cut": 0,
    "slow": 0,
    "raise": 1,
    "memory": 1,
    "nan": 1,
    "full": 1,
    "term": 143,
}


def launch(folder: Path, size: int, fault: str, rank: int, step: int) -> tuple[int, str]:
    """Exit code and output of one run; -1 if it had to be killed."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "mlx_fit.cli", "launch", "-n", str(size)]
    command += ["--max-restarts", "1", str(HERE / "soak_rank.py")]
    command += [str(folder), fault, str(rank), str(step)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE.parent
    )
    try:
        out, _ = process.communicate(timeout=LIMIT_SECONDS)
        return process.returncode, out
    except subprocess.TimeoutExpired:
        process.terminate()
        out, _ = process.communicate()
        return -1, out


def result(folder: Path, size: int) -> list[dict]:
    """What the ranks wrote at the end of a run."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]


def one_round(folder: Path, size: int, fault: str, rank: int, step: int, whole: dict) -> str:
    """Run with a fault; what was wrong with its end, or nothing."""
    code, out = launch(folder, size, fault, rank, step)
    if code != FAULTS[fault]:
        return f"exit code {code} instead of {FAULTS[fault]}\n{out[-3000:]}"
    if not (folder / "fault").exists():
        return "the fault did not happen"
    if code:  # the user mends it, and starts again
        code, out = launch(folder, size, "none", 0, 0)
        if code:
            return f"did not go on: exit code {code}\n{out[-3000:]}"
    if any(found != whole for found in result(folder, size)):
        return "other weights or losses than without a fault"
    return ""


def soak(rounds: int, seed: int) -> int:
    """Number of rounds that ended otherwise than promised."""
    draw, failures = random.Random(seed), 0
    base = Path(tempfile.mkdtemp(prefix="soak-ranks-"))
    wholes = {}
    for size in (2, 3):
        code, out = launch(base / f"whole{size}", size, "none", 0, 0)
        assert code == 0, out
        wholes[size] = result(base / f"whole{size}", size)[0]
        assert all(found == wholes[size] for found in result(base / f"whole{size}", size))
    for number in range(rounds):
        fault = list(FAULTS)[number % len(FAULTS)]
        size = draw.choice([2, 2, 3])
        rank = 0 if fault == "full" else draw.randrange(size)
        step, folder = draw.randrange(5, 26), base / f"round{number}"
        start = time.monotonic()
        wrong = one_round(folder, size, fault, rank, step, wholes[size])
        failures += bool(wrong)
        print(
            f"{number + 1:4} {fault:5} rank {rank} of {size}, step {step:2}: "
            f"{wrong or 'as promised'} ({time.monotonic() - start:.1f} s)",
            flush=True,
        )
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(base, ignore_errors=True)
    print(f"{rounds} rounds, {failures} not as promised")
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(1 if soak(arguments.rounds, arguments.seed) else 0)
