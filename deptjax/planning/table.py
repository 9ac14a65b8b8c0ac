"""Plans as a person reads them: one in lines, several side by side in a table."""

from __future__ import annotations

from collections.abc import Sequence

from deptjax.planning.plan import Plan

_PARTS = {"compute": "FLOPs", "memory": "bytes of memory (estimated)", "network": "bytes sent"}


def report(plan: Plan) -> str:
    """Returns a plan in lines."""
    memory, rows = plan.memory, plan.rows
    lines = [
        f"{plan.model}, {plan.method}: {plan.backbone_parameters:,} parameters, {plan.trainable_parameters:,} trained",
        f"{_devices(plan)}, {_computed(plan)}; a batch of {rows.batch} rows of {rows.length} + {rows.targets} tokens",
        "",
        f"on each {_noun(plan)}",
        _line("frozen weights", size(memory.weights)),
        _line("trained, and optimiser", size(memory.state)),
        _line("activations and the rest", size(memory.rest)),
        _line("total", f"{size(memory.total)} of {size(memory.limit)}: {fits(plan)}"),
    ]
    if plan.cost is None:
        return "\n".join([*lines, "", "The compiler refused the step; nothing could be counted in it."])
    amounts = {
        "compute": number(plan.cost.total_flops),
        "memory": size(plan.cost.memory_bytes),
        "network": size(plan.cost.sent_bytes),
    }
    lines += ["", f"in each step, of each {_noun(plan)}"]
    for part, taken in plan.seconds.items():
        told = duration(taken) if taken or part != "network" or plan.devices == 1 else "not known"
        lines.append(_line(_PARTS[part], f"{amounts[part]:>12}   {told}"))
    for c in plan.cost.collectives:
        over = ",".join(c.axes) or "?"
        lines.append(_line(f"  {c.kind} over {over} ({c.devices})", f"{size(c.bytes):>12}   {c.count} of them"))
    step = f"a step takes {duration(plan.roofline_seconds)} or more, bound by {plan.bound}"
    rate = f"{plan.tokens_per_second:,.0f} tokens a second and {_noun(plan)} at most"
    lines += ["", f"roofline: {step}; {rate}"]
    if plan.cost.unknown_loops:
        lines.append(f"{plan.cost.unknown_loops} loops do not say how often they turn: each is counted as one turn")
    if plan.cost.unknown_kernels:
        lines.append(f"{plan.cost.unknown_kernels} runs of kernels do not say their FLOPs, which are not counted")
    return "\n".join(lines)


def comparison(plans: Sequence[Plan]) -> str:
    """Returns plans side by side, a row each, as a Markdown table whose columns are aligned."""
    head = ["method", "trained", "weights", "trained + optimiser", "rest", "total", "fits"]
    head += ["TFLOP", "sent", "step (roofline)", "bound by", "tokens/s"]
    table = [head]
    for plan in plans:
        memory, cost = plan.memory, plan.cost
        row = [plan.method, f"{plan.trainable_parameters:,}", size(memory.weights), size(memory.state)]
        row += [size(memory.rest), size(memory.total), "yes" if memory.fits else "no"]
        if cost is None:
            row += ["-"] * 5
        else:
            row += [f"{cost.total_flops / 1e12:.3g}", size(cost.sent_bytes), duration(plan.roofline_seconds)]
            row += [plan.bound, f"{plan.tokens_per_second:,.0f}"]
        table.append(row)
    first = plans[0]
    limit = f"{_noun(first)} of {size(first.memory.limit)}"
    title = f"{first.model} ({first.backbone_parameters:,} parameters, {_computed(first)}) on {_devices(first)}, "
    title += f"{first.rows.batch} rows of {first.rows.length} + {first.rows.targets} tokens; bytes on each {limit}"
    return f"{title}\n\n{markdown(table)}"


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table of aligned columns, the first row its head; numbers are to the right.

    >>> print(markdown([["a", "n"], ["long", "1"]]))
    | a    |  n |
    | :--- | -: |
    | long |  1 |
    """
    widths = [max(2, *(len(row[i]) for row in table)) for i in range(len(table[0]))]

    def line(cells: Sequence[str]) -> str:
        parts = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths))]
        return "| " + " | ".join(parts) + " |"

    rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(table[0]), line(rule), *map(line, table[1:])])


def fits(plan: Plan) -> str:
    """Returns whether a plan fits, in words."""
    return "fits" if plan.memory.fits else "does not fit"


def size(count: float) -> str:
    """Returns bytes with a unit.

    >>> size(1536), size(3 * 2**30)
    ('1.50 KiB', '3.00 GiB')
    """
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.{2 if count < 100 else 1}f} {unit}"
        count /= 1024
    raise AssertionError("the last unit takes any size")


def number(count: float) -> str:
    """Returns a large number with a letter.

    >>> number(14.7e12), number(950.0)
    ('14.7 T', '950')
    """
    for exponent, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if count >= 10**exponent:
            return f"{count / 10**exponent:.3g} {letter}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """Returns seconds in the unit in which they read well.

    >>> duration(0.0123), duration(2.5)
    ('12.3 ms', '2.5 s')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.2g} us"


def _devices(plan: Plan) -> str:
    mesh = ",".join(f"{axis}:{count}" for axis, count in plan.mesh.items())
    told = f"{plan.devices} x {plan.chip.name}" if plan.devices > 1 else f"1 {plan.chip.name}"
    peaks = ", its speed measured here" if plan.chip.measured else ""
    return f"{told}{f' ({mesh})' if mesh else ''}{peaks}"


def _computed(plan: Plan) -> str:
    told = [plan.dtype, *([] if plan.quantize is None else [f"kernels in {plan.quantize}"])]
    told += [] if plan.attention == "auto" else [f"attention {plan.attention}"]
    return ", ".join(told + ([] if plan.remat == "none" else [f"remat {plan.remat}"]))


def _noun(plan: Plan) -> str:
    return "device" if plan.chip.measured else "chip"


def _line(name: str, value: str) -> str:
    return f"  {name:34} {value}"
