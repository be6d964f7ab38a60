"""A page of HTML about runs, in one file: no script, nothing that is loaded from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from mlx_fit import metrics
from mlx_fit._version import __version__
from mlx_fit.cli.report_charts import Curve, chart, drawable, number
from mlx_fit.cli.report_runs import Points, Run
from mlx_fit.errors import ConfigurationError
from mlx_fit.runtime.memory import format_bytes

COLOURS = {  # as many as people tell apart; light and dark ground
    "light": ["#0b62c4", "#c4500a", "#0f7f57", "#a02c88", "#8a6a00", "#c8102e", "#0b7c96"],
    "dark": ["#6fb1ff", "#ff9d5c", "#4fd1a0", "#e58ad0", "#e0bf4f", "#ff7a85", "#5fd0e8"],
}
DASHES = ("none", "6 4", "2 3", "8 3 2 3")
NOTHING = "-"


def page(runs: list[Run]) -> str:
    """The whole page.

    Args:
        runs: at least one, with names that differ.
    """
    names = ", ".join(run.name for run in runs)
    axis = common_axis(runs)
    sections = [
        ("Runs", _overview(runs)),
        ("Curves", _charts(runs, axis)),
        ("Final metrics", _final(runs, axis)),
        ("Arguments", _differing(runs, [run.arguments for run in runs])),
        ("Environment", _differing(runs, [run.versions for run in runs])),
        ("Checkpoints", "".join(map(_checkpoints, runs))),
    ]
    body = "".join(f"<section><h2>{head}</h2>{text}</section>" for head, text in sections if text)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Runs: {_escape(names)}</title><style>{_style()}</style></head>\n"
        f"<body><h1>Training runs</h1>{body}"
        f"<footer>Written by mlx-fit {_escape(__version__)}.</footer></body></html>\n"
    )


def common_axis(runs: list[Run]) -> str:
    """``"epoch"``, or ``"step"`` where epochs give no curve and every run knows its steps."""
    has_epochs = any(len(p) > 1 for run in runs for p in run.by_epoch.values())
    return "step" if not has_epochs and all(run.by_step for run in runs) else "epoch"


def curves_of(run: Run, axis: str) -> dict[str, Points]:
    """The run's curves over epochs or steps."""
    return run.by_step if axis == "step" else run.by_epoch


def base_of(key: str, known: Iterable[str]) -> tuple[str, str]:
    """The value that a key is about, and the validation set it is of (``""``: training).

    >>> base_of("val_loss", ["loss"]), base_of("val_easy_loss", ["loss"]), base_of("loss", ["loss"])
    (('loss', 'validation'), ('loss', 'validation easy'), ('loss', ''))
    """
    bare = key.removeprefix("val_")
    if bare == key:
        return key, ""
    if bare in known:
        return bare, "validation"
    bases = [base for base in known if bare.endswith(f"_{base}")]
    if not bases:
        return bare, "validation"
    base = max(bases, key=len)
    return base, f"validation {bare.removesuffix(f'_{base}')}"


def is_higher_better(base: str) -> bool | None:
    """The direction of a value by its name; None: unknown."""
    if base == "loss" or base.endswith("_loss"):
        return False
    try:
        return metrics.get(base).higher_is_better
    except ConfigurationError:
        return None


# --- sections -------------------------------------------------------------------------------------


def _overview(runs: list[Run]) -> str:
    rows: list[tuple[str, Callable[[Run], Any]]] = [
        ("read from", lambda run: run.path),
        ("epochs", lambda run: run.num_epochs),
        ("steps", lambda run: run.step),
        ("stopped by", lambda run: run.stopped_by),
    ]
    found = [(label, [get(run) for run in runs]) for label, get in rows]
    shown = [
        (label, [_cell(NOTHING if value is None else str(value)) for value in values])
        for label, values in found
        if any(value is not None for value in values)
    ]
    return _table(runs, shown)


def _charts(runs: list[Run], axis: str) -> str:
    known = _bases(runs, axis)
    sets: dict[str, int] = {"": 0}
    groups: dict[str, list[Curve]] = {}
    for index, run in enumerate(runs):
        for key, points in curves_of(run, axis).items():
            if not any(drawable(value) for _, value in points):
                continue
            base, subset = base_of(key, known)
            dash = sets.setdefault(subset, len(sets)) % len(DASHES)
            label = f"{run.name}, {subset or 'training'} {base}"
            curve = Curve(label, points, index % len(COLOURS["light"]), dash)
            groups.setdefault(base, []).append(curve)
    pictures = "".join(
        f"<figure><figcaption>{_escape(base)}</figcaption>{chart(base, curves, axis)}</figure>"
        for base, curves in groups.items()
    )
    return f'{_legend(runs, sets)}<div class="charts">{pictures}</div>' if pictures else ""


def _legend(runs: list[Run], sets: Mapping[str, int]) -> str:
    entries = [(index, 0, run.name) for index, run in enumerate(runs)]
    entries += [(-1, place, subset or "training") for subset, place in sets.items()]
    items = "".join(
        f'<li><svg viewBox="0 0 28 8" class="swatch" aria-hidden="true">'
        f'<g class="{_colour_class(colour)} d{dash % len(DASHES)}">'
        f'<polyline points="0,4 28,4"/></g></svg> {_escape(text)}</li>'
        for colour, dash, text in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _final(runs: list[Run], axis: str) -> str:
    """The last value of each key, the best where its direction is known."""
    known = _bases(runs, axis)
    rows = []
    for key in dict.fromkeys(key for run in runs for key in (run.by_epoch or run.by_step)):
        base, subset = base_of(key, known)
        # Between two steps stands the noise of a few batches, whose best says nothing.
        higher = is_higher_better(base) if subset or axis == "epoch" else None
        bests = [_best(curves_of(run, axis).get(key, []), higher) for run in runs]
        values = [value for _, value in filter(None, bests)]
        winner = None
        if len(runs) > 1 and values:
            winner = max(values) if higher else min(values)
        cells = []
        for run, best in zip(runs, bests, strict=True):
            points = (run.by_epoch or run.by_step).get(key, [])
            text = number(points[-1][1]) if points else NOTHING
            if best:
                text += f" (best {number(best[1])} at {axis} {best[0]:g})"
            cells.append(_cell(text, "best" if best and best[1] == winner else ""))
        rows.append((key, cells))
    return _table(runs, rows) if rows else ""


def _best(points: Points, higher: bool | None) -> tuple[float, float] | None:
    finite = [point for point in points if math.isfinite(point[1])]
    if higher is None or not finite:
        return None
    return (max if higher else min)(finite, key=lambda point: point[1])


def _differing(runs: list[Run], facts: list[Mapping[str, Any]]) -> str:
    """One row a key; those that differ are marked, by colour and by a sign."""
    rows, num_differ = [], 0
    for key in dict.fromkeys(key for one in facts for key in one):
        texts = [_text(one[key]) if key in one else NOTHING for one in facts]
        # Logs know no arguments: a run that has none at all differs in nothing.
        differs = len({text for text, one in zip(texts, facts, strict=True) if one}) > 1
        num_differ += differs
        marks = ["differs" if differs and one else "" for one in facts]
        cells = [_cell(text, mark) for text, mark in zip(texts, marks, strict=True)]
        rows.append((f"≠ {key}" if differs else key, cells))
    if not rows:
        return ""
    note = ""
    if sum(map(bool, facts)) > 1:
        note = f"<p>{num_differ or 'None'} of {len(rows)} differ{' (≠)' if num_differ else ''}.</p>"
    return note + _table(runs, rows)


def _checkpoints(run: Run) -> str:
    if not run.checkpoints:
        return ""
    heads = ("checkpoint", "step", "epoch", "size", "values")
    rows = ""
    for saved in run.checkpoints:
        if saved.num_bytes is None:
            cells = [_cell(saved.name), _cell("DAMAGED", "damaged"), "", "", _cell(saved.damage)]
            rows += f"<tr>{''.join(cell or _cell('') for cell in cells)}</tr>"
            continue
        values = ", ".join(f"{key} {number(value)}" for key, value in saved.values.items())
        size = format_bytes(saved.num_bytes)
        texts = (saved.name, str(saved.step), str(saved.epoch), size, values)
        rows += f"<tr>{''.join(_cell(text) for text in texts)}</tr>"
    total = sum(saved.num_bytes or 0 for saved in run.checkpoints)
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        f"<h3>{_escape(run.name)}: {format_bytes(total)}</h3><div class='wide'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


# --- pieces ---------------------------------------------------------------------------------------


def _bases(runs: list[Run], axis: str) -> list[str]:
    keys = dict.fromkeys(key for run in runs for key in curves_of(run, axis))
    return [key for key in keys if not key.startswith("val_")]


def _table(runs: list[Run], rows: list[tuple[str, list[str]]]) -> str:
    head = "".join(f'<th scope="col">{_escape(run.name)}</th>' for run in runs)
    lines = "".join(
        f'<tr><th scope="row">{_escape(label)}</th>{"".join(cells)}</tr>' for label, cells in rows
    )
    return (
        f'<div class="wide"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _cell(text: str, kind: str = "") -> str:
    return f"<td{f' class={kind}' if kind else ''}>{_escape(text)}</td>"


def _text(value: Any) -> str:
    """A value as it was written in a program: float32's nearest to 0.01 is 0.01."""
    if isinstance(value, float) and math.isfinite(value) and abs(value) < 1e38:
        narrow = np.float32(value)
        return str(narrow) if float(narrow) == value else repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_text(item)}' for key, item in value.items())}}}"
    return str(value)


def _colour_class(colour: int) -> str:
    return "plain" if colour < 0 else f"c{colour % len(COLOURS['light'])}"


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _style() -> str:
    def variables(ground: str) -> str:
        return "".join(f"--c{i}:{colour};" for i, colour in enumerate(COLOURS[ground]))

    lines = "".join(f".c{i}{{--line:var(--c{i})}}" for i in range(len(COLOURS["light"])))
    dashes = "".join(
        f".d{i} polyline{{stroke-dasharray:{dash}}}" for i, dash in enumerate(DASHES) if i
    )
    light = f":root{{color-scheme:light dark;{_LIGHT}{variables('light')}}}"
    dark = f"@media(prefers-color-scheme:dark){{:root{{{_DARK}{variables('dark')}}}}}"
    return light + dark + _RULES + lines + dashes


_LIGHT = "--ground:#fff;--text:#1c1c1e;--soft:#5f6368;--rule:#dcdfe3;--mark:#fff1c9;--bad:#b3001b;"
_DARK = (
    "--ground:#16181c;--text:#e8eaed;--soft:#a0a6ad;--rule:#363a40;--mark:#4d4014;--bad:#ff8a8a;"
)
_RULES = """
body{margin:0 auto;padding:1.5rem;max-width:80rem;background:var(--ground);color:var(--text);
font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.6rem;margin:0 0 .5rem}h2{font-size:1.2rem;margin:2rem 0 .6rem}
h3{font-size:1rem;margin:1rem 0 .4rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1rem}
figure{margin:0;border:1px solid var(--rule);border-radius:6px;padding:.5rem}
figcaption{font-weight:600;padding:0 .3rem .2rem;overflow-wrap:anywhere}
figure svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:11px}.grid{stroke:var(--rule)}
polyline{fill:none;stroke:var(--line);stroke-width:1.8;stroke-linejoin:round}
circle{fill:var(--line)}.plain{--line:var(--soft)}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;list-style:none;padding:0;margin:0 0 .8rem}
.swatch{width:28px;height:8px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.25rem .9rem .25rem 0;border-bottom:1px solid var(--rule);
vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere}
th{font-weight:600}tbody th{font-weight:400;color:var(--soft)}
td{min-width:5rem}.differs{background:var(--mark);padding-left:.4rem}.best{font-weight:700}
.damaged{color:var(--bad);font-weight:700}
footer{margin-top:2.5rem;color:var(--soft)}
"""
