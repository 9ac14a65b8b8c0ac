"""`deptjax import`: an adapter of another library as a prompt that `deptjax predict` answers with."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from deptjax.cli.entry import run_command
from deptjax.errors import UserError

EXAMPLES = r"""
  deptjax import --from adapters/lora --model meta-llama/Llama-3.2-1B --output prompts/lora
  deptjax import --from DePT/checkpoints/sst2 --model t5-base --task movie_sentiment --output prompts/sst2
  deptjax import --from prompt.npy --model t5-base --input "sentence: {sentence}" --labels 0,1 --output prompts/cola

An adapter names no task. Without --task or --input it answers bare texts with free text.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Makes a prompt of an adapter. Returns the exit status (see `deptjax.cli.entry`)."""
    return run_command(_import, argv)


def _import(words: list[str]) -> int:
    from deptjax.cli.setup import one_host_only, prepare

    prepare()
    one_host_only("import")
    from deptjax.cli import flags, settings
    from deptjax.data.tasks import Task
    from deptjax.interop.load import load_backbone
    from deptjax.interop.prompts import load_prompt
    from deptjax.training.state import count_parameters

    parser = flags.Parser(
        "deptjax import",
        "--from PATH --model NAME --output DIR [FLAGS]",
        "Make a prompt of an adapter of HF peft or of DePT's authors, or of a file of arrays.",
        EXAMPLES,
    )
    group = parser.add_argument_group("what")
    group.add_argument(
        "--from", metavar="PATH", help="the adapter's folder, or a .safetensors, .npz, .npy, .bin or .pt file of arrays"
    )
    group.add_argument("--output", metavar="DIR", help="the folder of the new prompt")
    group.add_argument("--overwrite", action="store_true", help="replace a prompt that is there")
    flags.add_model(parser)
    flags.add_task(parser)
    flags.add_general(parser)
    options, bindings = parser.parse(words)
    if bindings:
        raise UserError(f"--gin.{bindings[0]}: import takes no gin settings; use flags")
    source = flags.required(options, "from", "the adapter's folder, or a file of arrays")
    output = pathlib.Path(flags.required(options, "output", "the folder of the new prompt")).expanduser()
    given = flags.given_by_flags(options, parser)
    model = settings.model_settings(given)
    if "name_or_path" not in model:
        raise UserError("no --model; it names the backbone that the adapter belongs to")
    _check_output(output, "overwrite" in options)
    task = None
    if any(owner in ("train", "Task", "FileSource") for owner, _ in given):
        name = pathlib.Path(source).expanduser().resolve().stem
        task = settings.make_task(given, Task(name or "prompt", None, "{text}"))
        if task.labels is None:
            task = dataclasses.replace(task, labels=())
    prompt = load_prompt(source, load_backbone(**model), task)
    prompt.save(output)
    numbers = count_parameters(prompt.trainable)
    print(f"{output}: {prompt.method.kind} of {numbers:,} numbers, for task '{prompt.task['name']}'")
    return 0


def _check_output(output: pathlib.Path, overwrite: bool) -> None:
    from deptjax.prompt import CARD, TENSORS, check_holds_no_more

    try:
        there = check_holds_no_more(output, (CARD, TENSORS))
    except UserError as error:
        raise UserError(f"--output {error}") from None
    if there and not overwrite:
        raise UserError(f"--output {output} exists; name another folder, or add --overwrite")
