"""Transfer: a run that starts from another task's prompt, and which prompt to start from.

Vu et al., "SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer", ACL 2022, arXiv 2110.07904: a prompt
tuned on a source task is where tuning on the target task starts; the source is one chosen beforehand, or the one whose
prompt is most like a prompt tuned on the target task for a while. The authors of DePT start few-shot runs this way,
with the soft prompt and both low-rank factors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from deptjax.errors import UserError, nearest
from deptjax.methods.base import ENCODER, FIXED, Method, method_fields
from deptjax.prompt import Prompt
from deptjax.typing import Tree

PromptOrFolder = Prompt | str | os.PathLike[str]


def started_from(
    trainable: Tree, method: Method, source: Prompt, parts: tuple[str, ...] | None = None, where: str = "the prompt"
) -> Tree:
    """Returns `trainable` with its parameters, or those named in `parts`, replaced by the ones of `source`.

    A factor that both methods' formulas multiply with a constant, and with another one (`lora_b` of DePT at another
    alpha), is rescaled, so that it means what it meant.

    Args:
      trainable: the first parameters of a run.
      method: the run's, resolved.
      source: a prompt with parameters of the same names and shapes; it may have more.
      parts: last names of parameters, such as `("prompt", "lora_a")`; None for all that the run tunes.
      where: what messages call the source.

    Raises:
      UserError: for a part that the run has not, and a parameter that the source has not, or of another shape.
    """
    if source.method.kind != method.kind:  # of a prompt in parts (MPT's) another method has what they make
        simpler, folded = source.method.fold(source.trainable)
        source = dataclasses.replace(source, method=simpler, trainable=folded)
    own = traverse_util.flatten_dict(trainable)
    given = traverse_util.flatten_dict(source.trainable)
    names = dict.fromkeys(path[-1] for path in own)
    for part in parts or ():
        if part not in names:
            raise UserError(
                f"start_parts: method '{method.kind}' has no '{part}'; it has {', '.join(names)}.{nearest(part, names)}"
            )
    old, new = source.method.scales(), method.scales()
    started = dict(own)
    for path, first in own.items():
        name = path[-1]
        if (parts is not None and name not in parts) or (parts is None and method.group(path) == FIXED):
            continue  # what a method brings with it is this run's own
        if path[0] == ENCODER and ENCODER not in source.trainable and parts is None:
            continue  # the source's encoder was frozen: this run's starts where that one stood
        if path not in given:
            there = ", ".join(dict.fromkeys(path[-1] for path in given))
            lacks = f"{where} is a prompt of '{source.method.kind}' ({there}), of which '{method.kind}' has nothing"
            if not own.keys() & given.keys() and _takes_soft_prompt(method, source):
                raise UserError(f"{lacks}; its soft prompt alone is taken by prompt_init (--prompt-init FOLDER)")
            if not set(names) & {path[-1] for path in given}:
                raise UserError(
                    f"{lacks}; a run saves its prompt without the network that made it, so start a run of that method"
                    " from it"
                )
            raise UserError(
                f"{where} (method '{source.method.kind}') has no {'/'.join(path)}; it has {there}: name in start_parts "
                "what to start from"
            )
        if given[path].shape != first.shape:
            raise UserError(
                f"{where} has {'/'.join(path)} of shape {given[path].shape}, and this run's is {first.shape}; give the "
                f"method the sizes of the prompt, or leave {name} out of start_parts"
            )
        ratio = old[name] / new[name] if old.get(name) and new.get(name) else 1.0
        started[path] = jnp.asarray(given[path] * np.asarray(ratio, given[path].dtype), first.dtype)
    return traverse_util.unflatten_dict(started)


def _takes_soft_prompt(method: Method, source: Prompt) -> bool:
    """Returns whether `prompt_init` of a method can name the prompt."""
    if "prompt_init" in method_fields(type(method)):
        with contextlib.suppress(UserError):  # of a prompt that holds none
            source.soft_prompt()
            return True
    return False


def similar_prompts(prompts: Mapping[str, PromptOrFolder], target: PromptOrFolder) -> list[tuple[str, float]]:
    """Returns the names of source prompts with their similarity to the target's, the most similar first.

    The similarity of SPoT (section 4.1, "cosine similarity of average tokens"): of a soft prompt (M, D) the mean over
    its M vectors is taken, and of two means the cosine. Prompts may differ in length and method: offsets are left out,
    and a prompt in parts (MPT's, DPT's, ACCEPT's) is the one that these make.

    Args:
      prompts: saved prompts, or their folders, by name.
      target: a prompt tuned on the target task; few steps do.

    Raises:
      UserError: for no prompts, a method without a soft prompt or with one for each text, and a prompt of another
        backbone than the target's.

    >>> from deptjax.methods import PromptTuning
    >>> soft = lambda *rows: {"input": {"prompt": np.array(rows)}}
    >>> made = lambda *rows: Prompt(PromptTuning(len(rows)), soft(*rows), "tiny", {"width": 2}, {})
    >>> similar_prompts({"far": made([0.0, 2.0]), "near": made([3.0, 1.0], [1.0, 1.0])}, made([1.0, 0.0]))
    [('near', 0.894...), ('far', 0.0)]
    """
    if not (isinstance(prompts, Mapping) and prompts):
        raise UserError("similar_prompts: give at least one prompt, by name: {'trec6': 'runs/trec6/prompt'}")
    aim = _loaded(target)
    mean = _mean_vector(aim, "target")
    found = []
    for name, given in prompts.items():
        prompt = _loaded(given)
        if prompt.fingerprint != aim.fingerprint:
            raise UserError(
                f"similar_prompts: '{name}' was tuned on '{prompt.backbone}', and the target on '{aim.backbone}'; "
                "compare prompts of one backbone"
            )
        found.append((name, _cosine(_mean_vector(prompt, name), mean)))
    return sorted(found, key=lambda pair: -pair[1])


def _loaded(prompt: PromptOrFolder) -> Prompt:
    return prompt if isinstance(prompt, Prompt) else Prompt.load(prompt)


def _mean_vector(prompt: Prompt, name: str) -> np.ndarray:
    return prompt.soft_prompt(f"similar_prompts: '{name}'").astype(np.float64).mean(axis=0)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / norms if norms else 0.0
