"""`deptjax export`: a tuned prompt in the format of another library, or as the input embeddings of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deptjax.cli.entry import run_command
from deptjax.errors import UserError

EXAMPLES = """
  deptjax export --prompt runs/lora/prompt --format peft --output adapters/lora
  deptjax export --prompt runs/sms/prompt --format dept --output adapters/sms
  deptjax export --prompt runs/sms/prompt --format npz --output sms.npz
  deptjax export --prompt runs/sms/prompt --format embeds --text "You have won a prize !"
  deptjax export --prompt runs/sms/prompt --format embeds messages.txt --output messages.safetensors

formats:
  peft         a folder that peft.PeftModel.from_pretrained loads (prompt tuning, prefix tuning, LoRA)
  dept         a folder as DePT's authors' code writes it
  npz, safetensors, npy    bare arrays; npy holds a soft prompt alone
  embeds       for each text the input embeddings (M+T, D), prompt included, for a server that takes embeddings:
               JSON lines with text, shape, dtype and prompt_embeds, the base64 of a torch file, as vLLM's
               completions API takes it; or arrays text_1, text_2 .. where the output ends in .safetensors or .npz,
               and one array where it ends in .npy
"""
EMBEDS = "embeds"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a prompt. Returns the exit status (see `deptjax.cli.entry`)."""
    return run_command(_export, argv)


def _export(words: list[str]) -> int:
    from deptjax.cli.setup import one_host_only, prepare

    prepare()
    one_host_only("export")
    from deptjax.cli import flags
    from deptjax.cli.model import backbone_of
    from deptjax.interop.prompts import FORMATS, export_prompt
    from deptjax.prompt import Prompt

    parser = flags.Parser(
        "deptjax export",
        "--prompt DIR --format NAME --output PATH [FLAGS]",
        "Write a tuned prompt in the format of another library.",
        EXAMPLES,
    )
    group = parser.add_argument_group("what")
    group.add_argument("--prompt", metavar="DIR", help="a saved prompt: the folder prompt of a run")
    group.add_argument("--format", metavar="NAME", choices=(*FORMATS, EMBEDS), help=", ".join((*FORMATS, EMBEDS)))
    group.add_argument("--output", metavar="PATH", help="a folder (peft, dept) or a file; embeds: standard output")
    group.add_argument("--overwrite", action="store_true", help="replace what is there, if it is an export")
    texts = parser.add_argument_group("texts (with --format embeds)")
    texts.add_argument("--text", metavar="TEXT", action="append", help="a text; may be given more than once")
    texts.add_argument(
        "input", metavar="INPUT", nargs="?", help="a file of texts or JSON lines, or - for standard input"
    )
    texts.add_argument("--encoding", metavar="NAME", help="of the file (default utf-8)")
    flags.add_encoder(texts)
    flags.add_model(parser, " (default: the one the prompt names)")
    flags.add_general(parser)
    options, bindings = parser.parse(words)
    if bindings:
        raise UserError(f"--gin.{bindings[0]}: export takes no gin settings; use flags")
    place = flags.required(options, "prompt", "a saved prompt, such as runs/x/prompt")
    format = flags.required(options, "format", f"the format to write: {', '.join((*FORMATS, EMBEDS))}")
    if format != EMBEDS:
        output = flags.required(options, "output", "where to write")
        _check_no_texts(options, format)
    prompt = Prompt.load(place)
    if format == EMBEDS:
        from deptjax.cli.embeds import texts_of, write_embeddings
        from deptjax.inference.text_encoder import load_given_encoder

        rows = texts_of(options, prompt)
        backbone = backbone_of(prompt, place, flags.given_by_flags(options, parser))
        encoder = load_given_encoder(options["encoder"], [prompt]) if "encoder" in options else None
        write_embeddings(backbone, prompt, rows, options.get("output"), "overwrite" in options, encoder)
        return 0
    backbone = backbone_of(prompt, place, flags.given_by_flags(options, parser))
    print(export_prompt(prompt, backbone, output, format, overwrite="overwrite" in options))
    return 0


def _check_no_texts(options: dict[str, Any], format: str) -> None:
    for name in ("text", "input"):
        if options.get(name):
            raise UserError(f"{name} {options[name]!r} is for --format {EMBEDS}; leave it out with --format {format}")
