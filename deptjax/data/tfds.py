"""Rows of TensorFlow Datasets that were prepared on this disk; without TensorFlow where they are array_record files."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from deptjax.data.named_splits import NamedSplits, one_line, shortest
from deptjax.data.sources import register_source
from deptjax.data.templates import Row
from deptjax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class TFDSSource(NamedSplits):
    """A prepared data set of TensorFlow Datasets, read with the library `tensorflow_datasets` (extra `tfds`).

    The files are found where `tfds` puts them, `data_dir/NAME/CONFIG/VERSION`, and read in their order; the code that
    prepared them is not needed. Those of the format `array_record` need no TensorFlow, TFRecord files do. A column of
    class labels holds their numbers; verbalizers of the task may give them words. A split may be a part of one, such as
    `train[:90%]`. Nothing is downloaded.

    Attributes:
        name: `mnist`, `glue/sst2`, or with a version `glue/sst2:2.0.0`; without one, the latest that is prepared.
        data_dir: the folder of all data sets; None for `$TFDS_DATA_DIR`, or `tensorflow_datasets` in the home folder.
        train: the split that is trained on.
        dev, test: splits; where None, the rows are drawn from `train` without duplicates across the splits.
        dev_size, test_size: rows to draw, as a share below 1 or a count; used only where the split is None.
        seed: draws the split.
    """

    name: str
    data_dir: str | None = None
    kind: ClassVar[str] = "tfds"

    def __post_init__(self) -> None:
        if self.data_dir is not None:
            object.__setattr__(self, "data_dir", os.fspath(self.data_dir))
        if not re.fullmatch(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?", self.name):
            raise UserError(f"name='{self.name}' is no name of a data set; write it as 'glue/sst2' or 'mnist:3.0.1'")

    @property
    def title(self) -> str:
        """The name, for messages."""
        return self.name

    def rows(self, split: str) -> tuple[Row, ...]:
        """Returns the rows of one split, in their order; see `NamedSplits.rows`."""
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                f"{self.name} is read with the library tensorflow_datasets, which cannot be imported ({error}); "
                "install it: pip install 'deptjax[tfds]'"
            ) from None
        folder = self._folder()
        try:
            builder = tfds.builder_from_directory(folder)
        except Exception as error:  # of a file that is missing or damaged: protobuf's own, among others
            raise UserError(f"{folder} cannot be read ({one_line(error)}); prepare {self.name} again") from None
        if split.partition("[")[0] not in builder.info.splits:  # what stands in brackets is tfds' own to check
            raise self.no_split(split, builder.info.splits)
        try:
            rows = list(_rows(_examples(tfds, builder, split), builder.info.features))
        except ModuleNotFoundError as error:
            raise UserError(
                f"{self.name}: {folder} holds {builder.info.file_format.value} files, which only TensorFlow reads "
                f"({error}); install tensorflow, or {self._prepare()}"
            ) from None
        except ValueError as error:  # of what stands in brackets
            raise UserError(f"{self.name}, split '{split}': {one_line(error)}") from None
        except Exception as error:  # of a reader of files, each with exceptions of its own
            raise UserError(
                f"{self.name}, split '{split}': its files in {folder} cannot be read ({one_line(error)}); prepare it "
                "again"
            ) from None
        return self.made_rows(split, rows)

    def _folder(self) -> Path:
        """Returns the folder of the wanted version."""
        top = Path(self.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
        name, _, version = self.name.partition(":")
        versions = {path.name: path for path in (top / name).glob("*.*.*") if (path / "dataset_info.json").is_file()}
        if not versions and "/" not in name:
            configs = sorted({path.parent.parent.name for path in (top / name).glob("*/*/dataset_info.json")})
            if configs:
                known = ", ".join(f"{name}/{config}" for config in configs)
                raise UserError(f"{name} has several configurations in {top}: {known}; name one of them")
        if version and version not in versions and versions:
            there = sorted(versions)
            raise UserError(
                f"{name} is in {top} in version {', '.join(there)}, not {version}.{nearest(version, there)}"
            )
        if not versions:
            there = [str(path.parent.parent.relative_to(top)) for path in top.glob("**/dataset_info.json")]
            raise UserError(f"{self.name} is not in {top}; {self._prepare()}.{nearest(name, there)}")
        return versions[version or max(versions, key=_numbers)]

    def _prepare(self) -> str:
        folder = f", data_dir={self.data_dir!r}" if self.data_dir else ""
        return (
            f'prepare it: python -c "import tensorflow_datasets as tfds; tfds.builder({self.name!r}{folder}, '
            "file_format='array_record').download_and_prepare()\" (which may need tensorflow, reading it does not)"
        )


def plain(value: Any) -> Any:
    """Returns a value as tfds gives it in Python's own types, through lists and dicts.

    Bytes that are UTF-8 become a text, others stay; numbers and arrays of numpy become Python's.
    """
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, np.generic):
        return plain(value.item())
    if hasattr(value, "to_list"):  # rows of unequal length, as TensorFlow has them
        return plain(value.to_list())
    if isinstance(value, (np.ndarray, list, tuple)):
        return [plain(part) for part in value]
    return value


def _rows(examples: Iterable[Any], features: Any) -> Iterator[dict[str, object]]:
    """Yields rows as Python values, where a float32 is the shortest number that means it."""
    short = [
        name for name, feature in features.items() if getattr(feature, "np_dtype", None) in (np.float32, np.float16)
    ]
    for example in examples:
        row = plain(example)
        yield {**row, **{name: shortest(row[name]) for name in short if isinstance(row[name], float)}}


def _examples(tfds: Any, builder: Any, split: str) -> Iterable[dict[str, Any]]:
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError:  # files that cannot be read at random
        import tensorflow  # noqa: F401  the message of its absence, before tfds' own

        in_order = tfds.ReadConfig(interleave_cycle_length=1)
        return tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False, read_config=in_order))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in version.split("."))


register_source(TFDSSource.kind, TFDSSource)
