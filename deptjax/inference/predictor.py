"""`Predictor`: texts in, labels or texts out, for one frozen backbone and any number of tuned prompts."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.data.preprocess import Example, Preprocessor
from deptjax.data.tasks import Task
from deptjax.data.templates import Row
from deptjax.errors import UserError, nearest
from deptjax.inference.evaluator import Answer, Evaluator
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel, check_context
from deptjax.prompt import Prompt
from deptjax.typing import Tree

logger = logging.getLogger(__name__)

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # source lengths that batches are padded to


@dataclasses.dataclass(frozen=True)
class _Loaded:
    prompt: Prompt
    model: PromptedModel
    trainable: Tree
    preprocessor: Preprocessor
    evaluator: Evaluator


class Predictor:
    """Answers with tuned prompts on one frozen backbone.

    ```python
    predict = Predictor(backbone, "runs/trec/prompt")
    predict(["How far is it to the moon ?"])  # [Answer(text='number', scores={'description': 0.01, ...})]
    ```

    Args:
      backbone: from `load_backbone`; a prompt that was tuned on another one is refused.
      prompts: a `Prompt`, a folder, or several by name: `{"sst2": prompt, "cola": "runs/cola/prompt"}`.
      batch_size: rows a batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Prompt | str | os.PathLike[str] | Mapping[str, Prompt | str | os.PathLike[str]],
        batch_size: int = 32,
    ) -> None:
        self._backbone, self._batch_size = backbone, batch_size
        self._tasks: dict[str, _Loaded] = {}
        if not isinstance(prompts, Mapping):
            only = prompts if isinstance(prompts, Prompt) else Prompt.load(prompts)
            prompts = {only.task["name"]: only}
        for name, prompt in prompts.items():
            self._tasks[name] = self._load(name, prompt)

    @property
    def tasks(self) -> list[str]:
        """The names under which prompts are loaded."""
        return list(self._tasks)

    def __call__(self, texts: Sequence[str | Mapping[str, object] | Row], task: str | None = None) -> list[Answer]:
        """Returns an answer for each text.

        Args:
          texts: bare texts, where the task's template has one column, or objects with its columns. A mistake is told
            with the text's number, that in a `Row` with its place.
          task: the name of a loaded prompt; may be left out when there is only one.

        Raises:
          UserError: for an unknown task, an empty text, or a missing column.
        """
        if isinstance(texts, str):
            raise UserError("a Predictor takes a list of texts, not one text: write predict([text])")
        loaded = self._loaded(task)
        cut = loaded.preprocessor.cut_count
        sources = [self._encode(loaded.preprocessor, number, text) for number, text in enumerate(texts, 1)]
        if cut == 0 and loaded.preprocessor.cut_count:
            logger.warning(
                "texts of more than %d tokens, the prompt's max_length, are cut", loaded.preprocessor.max_length
            )
        placeholder = np.zeros(1, np.int32)
        examples = [Example(source, placeholder, -1) for source in sources]
        return loaded.evaluator.answers(loaded.trainable, self._frozen(loaded), examples)

    def _encode(self, preprocessor: Preprocessor, number: int, text: str | Mapping[str, object] | Row) -> np.ndarray:
        try:
            return preprocessor.encode_text(preprocessor.task.source_text(text))
        except UserError as error:
            place = text.origin if isinstance(text, Row) else f"text {number}"
            told = str(error)
            raise UserError(told if told.startswith(place) else f"{place}: {told}") from None

    def _loaded(self, task: str | None) -> _Loaded:
        if task is None and len(self._tasks) == 1:
            return next(iter(self._tasks.values()))
        if task not in self._tasks:
            there = ", ".join(self._tasks)
            raise UserError(
                f"no prompt is loaded for task '{task}'; there are: {there}.{nearest(str(task), self._tasks)}"
            )
        return self._tasks[task]

    def _frozen(self, loaded: _Loaded) -> Tree:
        return {} if loaded.prompt.method.tunes_backbone else self._backbone.params

    def _load(self, name: str, prompt: Prompt | str | os.PathLike[str]) -> _Loaded:
        where = f"prompt '{name}'"
        if not isinstance(prompt, Prompt):
            where, prompt = str(prompt), Prompt.load(prompt)
        prompt.check_backbone(self._backbone, where)
        model = PromptedModel.build(self._backbone, prompt.method)
        task = dataclasses.replace(Task.from_config(prompt.task), source=None)
        length = prompt.settings["max_length"]
        causal = not self._backbone.config.is_encoder_decoder
        preprocessor = Preprocessor(self._backbone.tokenizer, task, causal=causal, max_length=length)
        check_context(self._backbone, model.method, length, preprocessor.longest_target())
        buckets = [b for b in LENGTHS if b < length] + [length]
        mode = prompt.settings.get("evaluation", "auto")
        evaluator = Evaluator(model, preprocessor, mode=mode, batch_size=self._batch_size, buckets=buckets)
        return _Loaded(prompt, model, jax.tree.map(jnp.asarray, prompt.trainable), preprocessor, evaluator)


def evaluate(
    backbone: Backbone,
    prompt: Prompt | str | os.PathLike[str],
    task: Task | str | None = None,
    *,
    split: str = "test",
    batch_size: int = 32,
) -> dict[str, float]:
    """Returns the task's metrics of a prompt on a split: `{"test/accuracy": 0.9}`.

    Args:
      backbone: the one the prompt was tuned on.
      prompt: a `Prompt` or its folder.
      task: `None` for the task the prompt was tuned for, with its own data.
      split: `train`, `dev` or `test`.
      batch_size: rows a batch.
    """
    from deptjax.data.tasks import get_task

    prompt = prompt if isinstance(prompt, Prompt) else Prompt.load(prompt)
    chosen = Task.from_config(prompt.task) if task is None else get_task(task) if isinstance(task, str) else task
    data = chosen.load()
    rows = getattr(data, split, None)
    if split not in ("train", "dev", "test") or not rows:
        raise UserError(f"task '{chosen.name}' has no rows in split '{split}'")
    predictor = Predictor(backbone, {"task": prompt}, batch_size)
    answers = predictor(rows)
    scores = data.task.score([answer.text for answer in answers], rows)
    return {f"{split}/{name}": value for name, value in scores.items()}
