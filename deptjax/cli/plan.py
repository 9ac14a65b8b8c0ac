r"""`deptjax plan`: a step compiled for devices that need not be there; a call of `deptjax.planning.make_plan` each."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from deptjax.cli.entry import run_command

EXAMPLES = r"""
  deptjax plan --model llama2_7b --method dept --mesh fsdp:16 --topology v5e:4x4 --batch 64 --length 256
  deptjax plan --model t5-3b --compare dept,prompt_tuning,lora,full --mesh fsdp --topology v5e:4x4
  deptjax plan --model t5-base --batch 8 --length 128

With --topology the TPU compiler itself compiles the training step, on any Linux machine: pip install 'deptjax[tpu]'.
Without, the step is compiled for the devices at hand, and their speed is measured. No weights are read or allocated.
"""
DEFAULT_BATCH, DEFAULT_LENGTH, DEFAULT_TARGETS = 32, 256, 8


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what a training step takes. Returns the exit status (see `deptjax.cli.entry`)."""
    return run_command(_plan, argv)


def _plan(words: list[str]) -> int:
    from deptjax.cli.setup import prepare

    prepare()
    from deptjax.cli import flags
    from deptjax.planning import CHIPS, Rows, check_rows, comparison, make_plan, measure, report
    from deptjax.training.config import TrainConfig

    parser = _parser()
    options, _ = parser.parse(words)
    methods = _methods(flags.given_by_flags(options, parser), options.get("compare"))
    model = flags.required(options, "model", "a size, such as llama2-7b, or a folder with config.json")
    name, config = model_config(model)
    rows = Rows(
        flags.whole(options, "batch", DEFAULT_BATCH),
        flags.whole(options, "length", DEFAULT_LENGTH),
        flags.whole(options, "target-length", DEFAULT_TARGETS),
    )
    train = TrainConfig(remat=options.get("remat", "none"))
    json_file = options.get("json")
    if json_file:
        _check_writable(json_file)
    name_of_chip, devices = _devices(options.get("topology"))
    config = _computed(config, options, devices[0].platform)
    placement = _placement(config, options, devices, None if name_of_chip is None else CHIPS[name_of_chip])
    for method in methods:
        check_rows(name, config, method, placement, rows)
    chip = measure(devices) if name_of_chip is None else CHIPS[name_of_chip]
    plans = []
    for method in methods:
        with _told(f"{method.kind} on {name}, {len(devices)} x {chip.name}", quiet="quiet" in options):
            plans.append(make_plan(name, config, method, placement, chip, rows, train))
    print(report(plans[0]) if len(plans) == 1 else comparison(plans))
    if json_file:
        found = [plan.to_json() for plan in plans]
        pathlib.Path(json_file).write_text(json.dumps(found[0] if len(found) == 1 else found, indent=2) + "\n")
    return 0


def _parser() -> Any:
    from deptjax.cli import flags
    from deptjax.methods import method_names

    usage = "--model MODEL [--method NAME | --compare A,B] [--topology v5e:4x4] [--mesh fsdp:16] [FLAGS]"
    told = "Say what a training step takes: bytes on each chip, FLOPs, collectives, the least time."
    parser = flags.Parser("deptjax plan", usage, told, EXAMPLES)
    group = parser.add_argument_group("plan")
    for flag, metavar, text in (
        ("model", "MODEL", "a published size, such as t5-3b or llama2_7b, or a folder with config.json"),
        ("compare", "A,B", f"methods side by side, of {', '.join(method_names())}"),
        ("topology", "SLICE", "compile for a slice of TPUs: v4:2x2x4, v5e:4x4, v5p:4x4x4, v6e:16x16, ..."),
        ("mesh", "MESH", "data:2,fsdp:4,model:2, or data, fsdp, tensor, fsdp+tensor, or auto (default)"),
        ("sharding-rules", "RULES", "logical axes split otherwise, such as vocab:none,embed:fsdp+model"),
        ("batch", "N", f"rows of a batch, over all chips (default {DEFAULT_BATCH})"),
        ("length", "N", f"source tokens of a row, padding included (default {DEFAULT_LENGTH})"),
        ("target-length", "N", f"target tokens of a row (default {DEFAULT_TARGETS})"),
        ("dtype", "TEXT", "of the backbone (default bfloat16, on a CPU float32)"),
        ("quantize", "TEXT", "the frozen kernels: int8, int4 or nf4 (default: not)"),
        ("attention", "TEXT", "auto (default), xla, cudnn (NVIDIA GPUs) or flash (TPUs)"),
        ("remat", "TEXT", "what layers keep for the gradient: none (default), dots or full"),
        ("json", "FILE", "write all figures there as well"),
    ):
        group.add_argument(f"--{flag}", metavar=metavar, help=text)
    group.add_argument(
        "--no-scan-layers", action="store_true", help="compile layer by layer: minutes for a large model"
    )
    group.add_argument("--quiet", action="store_true", help="no lines of progress")
    flags.add_method(parser)
    flags.add_general(parser)
    return parser


def _methods(given: Any, compared: str | None) -> list[Any]:
    """Returns the methods to plan for, each with the flags that it has."""
    from deptjax.cli.fields import FLAG, Given, fields_of
    from deptjax.cli.flags import METHOD
    from deptjax.cli.settings import make_method
    from deptjax.errors import UserError
    from deptjax.methods import method_class

    if compared is None:
        return [make_method(given)]
    if ("train", "method") in given:
        raise UserError("--method and --compare both say what to plan for; keep one")
    kinds = [kind.strip() for kind in compared.split(",") if kind.strip()]
    if not kinds:
        raise UserError("--compare names no method; write --compare dept,lora, say")
    fields = {kind: fields_of(method_class(kind), linen=True) for kind in kinds}
    for (owner, name), flag in given.items():
        if owner == METHOD and not any(name in there for there in fields.values()):
            raise UserError(f"{flag.origin}: none of {', '.join(kinds)} has such a field; leave it out")
    methods = []
    for kind, there in fields.items():
        own = {key: flag for key, flag in given.items() if key[0] != METHOD or key[1] in there}
        methods.append(make_method({**own, ("train", "method"): Given(kind, "--compare", FLAG)}))
    return methods


def model_config(told: str) -> tuple[str, Any]:
    """Returns the name and the config of a published size, or of a folder."""
    from deptjax.errors import UserError, nearest
    from deptjax.interop.huggingface import read_config
    from deptjax.models.sizes import SIZES

    name = told.lower().replace("_", "-")
    if name in SIZES:
        return name, SIZES[name]
    folder = pathlib.Path(told).expanduser()
    if folder.is_dir():
        return folder.resolve().name, read_config(folder)
    if name.startswith("packaged:"):
        raise UserError(f"--model '{told}': of a packaged model, name its published size.{nearest(name[9:], SIZES)}")
    raise UserError(
        f"--model '{told}' is neither a known size ({', '.join(SIZES)}) nor a folder with config.json."
        f"{nearest(name, SIZES)}"
    )


def _devices(topology: str | None) -> tuple[str | None, list[Any]]:
    """Returns the name of the chip and the devices to compile for: of a topology, or `None` and those at hand."""
    if topology:
        from deptjax.planning import tpu_devices

        return tpu_devices(topology)
    import jax

    return None, jax.devices()


def _computed(config: Any, options: dict[str, Any], platform: str) -> Any:
    """Returns the config with what the flags say about how it is computed."""
    from deptjax.errors import UserError, nearest
    from deptjax.interop.convert import DTYPES
    from deptjax.models.fused_attention import check_runs_here
    from deptjax.quantization import check_scheme

    dtype = options.get("dtype", "float32" if platform == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise UserError(f"--dtype '{dtype}' is not one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    own = {"dtype": dtype, "scan_layers": "no_scan_layers" not in options}
    attention, quantize = options.get("attention", config.attention), options.get("quantize")
    check_scheme(quantize)
    if "topology" not in options:
        check_runs_here(attention, dtype, config.head_dim)
    return dataclasses.replace(config, attention=attention, quantize=quantize, **own)


def _placement(config: Any, options: dict[str, Any], devices: list[Any], chip: Any) -> Any:
    """Returns the mesh over the devices; `auto` looks at the size of the model."""
    from deptjax.models.sizes import weight_bytes
    from deptjax.sharding import Placement

    return Placement.over(
        devices,
        mesh=options.get("mesh", "auto"),
        rules=options.get("sharding_rules"),
        config=config,
        weight_bytes=weight_bytes(config),
        device_bytes=None if chip is None else int(chip.memory_bytes),
    )


def _check_writable(path: str) -> None:
    """Raises `UserError` before anything is compiled, where the file could not be written."""
    from deptjax.errors import UserError

    place = pathlib.Path(path)
    if place.is_dir() or not place.absolute().parent.is_dir():
        raise UserError(f"--json {path}: not a file in a folder that exists; name another")


@contextlib.contextmanager
def _told(what: str, quiet: bool) -> Iterator[None]:
    """Says on standard error what is being compiled, and for how long; on a terminal the seconds go on counting."""
    if quiet:
        yield
        return
    start, done = time.perf_counter(), threading.Event()
    live = sys.stderr.isatty()

    def tick() -> None:
        while not done.wait(1.0):
            print(f"\rcompiling {what}: {time.perf_counter() - start:.0f} s", end="", file=sys.stderr, flush=True)

    print(f"compiling {what}", end="" if live else "\n", file=sys.stderr, flush=True)
    ticking = threading.Thread(target=tick, daemon=True)
    if live:
        ticking.start()
    try:
        yield
    finally:
        done.set()
        if live:
            ticking.join()
        print(f"{chr(13) if live else ''}compiled {what}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
