"""Rows of Hugging Face datasets: of the hub by name, of folders written by `save_to_disk`, of folders of files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from deptjax.data.named_splits import NamedSplits, one_line, shortest
from deptjax.data.sources import register_source
from deptjax.data.templates import Row
from deptjax.errors import UserError

_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes beside several splits, and beside one


@dataclasses.dataclass(frozen=True)
class HFSource(NamedSplits):
    """A data set of the Hugging Face hub, or one on this disk, read with the library `datasets` (extra `datasets`).

    A column of class labels holds their numbers; verbalizers of the task may give them words. On a hub's name, a split
    may be a part of one, such as `train[:90%]`. The first use downloads into the library's own cache.

    Attributes:
        path: a name on the hub (`nyu-mll/glue`), or a folder: what `save_to_disk` wrote, or data files. `~` stands for
            the home folder.
        name: which of the data set's configurations (`sst2`); None where there is one.
        revision: branch, tag or commit on the hub; a commit gives the same rows for ever.
        train: the split that is trained on.
        dev, test: splits; where None, the rows are drawn from `train` without duplicates across the splits.
        dev_size, test_size: rows to draw, as a share below 1 or a count; used only where the split is None.
        seed: draws the split.
    """

    path: str
    name: str | None = None
    revision: str | None = dataclasses.field(default=None, kw_only=True)
    kind: ClassVar[str] = "huggingface"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))  # so that a pathlib.Path serialises as well
        if not self.path.strip():
            raise UserError("path is empty; name a folder, or a data set of the hub")

    @property
    def title(self) -> str:
        """Path and configuration, for messages."""
        return self.path if self.name is None else f"{self.path}/{self.name}"

    def rows(self, split: str) -> tuple[Row, ...]:
        """Returns the rows of one split, in their order; see `NamedSplits.rows`."""
        library = self._library()
        folder = Path(self.path).expanduser()
        if any((folder / file).is_file() for file in _SAVED):
            found = self._saved(library, folder, split)
        else:
            found = self._loaded(library, str(folder) if folder.is_dir() else self.path, split)
        return self.made_rows(split, _plain(found))

    def _library(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"{self.title} is read with the library datasets, which cannot be imported ({error}); "
                "install it: pip install 'deptjax[datasets]'"
            ) from None
        return datasets

    def _saved(self, library: Any, folder: Path, split: str) -> Any:
        try:
            saved = library.load_from_disk(str(folder))
        except (OSError, ValueError, TypeError, LookupError) as error:  # a file that is missing, cut off or edited
            told = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"{folder} cannot be read as a saved data set ({told}); save it again") from None
        by_name = saved if isinstance(saved, library.DatasetDict) else {"train": saved}
        if split not in by_name:
            raise self.no_split(split, by_name)
        return by_name[split]

    def _loaded(self, library: Any, path: str, split: str) -> Any:
        if not Path(path).is_dir() and path.startswith((".", "~", "/")):
            raise UserError(f"{path}: no such folder; name a folder that save_to_disk wrote, or a data set of the hub")
        call = ", ".join(repr(part) for part in (self.path, self.name) if part is not None)
        call += f", revision={self.revision!r}" if self.revision else ""
        try:
            return library.load_dataset(path, self.name, split=split, revision=self.revision)
        except library.exceptions.DatasetNotFoundError as error:
            raise UserError(
                f"{self.title}: neither a folder here nor a data set of the hub that can be read ({one_line(error)}); "
                "mend the name, or log in where it is private"
            ) from None
        except OSError as error:  # no network, offline mode, a timeout, a full disk; or a folder without data
            if Path(path).is_dir():
                raise UserError(
                    f"{one_line(error)}; name a folder of .parquet, .csv or .jsonl files, or a saved one"
                ) from None
            raise UserError(
                f"{self.title} is not in the cache {library.config.HF_DATASETS_CACHE} and cannot be downloaded "
                f"({one_line(error)}); where there is a network run datasets.load_dataset({call}) into that cache, or "
                "save_to_disk(FOLDER) and give the folder as path"
            ) from None
        except library.exceptions.DatasetGenerationError as error:  # which says of its cause what went wrong
            told = one_line(error.__cause__ or error)
            raise UserError(f"{self.title}: the files cannot be read as rows ({told}); mend them") from None
        except StopIteration:  # what the library makes of an empty file
            raise UserError(f"{self.title}: split '{split}' has an empty file; fill it or remove it") from None
        except (ValueError, RuntimeError) as error:  # of an unknown configuration or split; a data set that is a script
            raise UserError(f"{self.title}, split '{split}': {one_line(error)}") from None


def _plain(data: Any) -> Iterator[dict[str, object]]:
    """Yields rows as Python values. A float32 becomes the shortest number that means it: 3.8, not 3.799999952316284."""
    short = [
        name for name, feature in data.features.items() if getattr(feature, "dtype", None) in ("float32", "float16")
    ]
    for row in data.with_format(None):
        for name in short:
            if row[name] is not None:
                row[name] = shortest(row[name])
        yield row


register_source(HFSource.kind, HFSource)
