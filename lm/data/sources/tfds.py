"""TensorFlow datasets: any by its name, and the record files of one that is built.

tensorflow_datasets is imported by the process that plans the work, and not before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.data.sources.base import Checked, Document, Fielded, Part, Problem, stretch_bytes, too_long
from lm.data.sources.opening import unreadable
from lm.data.sources.templates import Template, one_field
from lm.data.sources.tfrecord import bytes_feature, read_records
from lm.data.tf import tensorflow
from lm.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


class Records(Checked):
    """Reads text features of TFRecord files, whoever wrote them. Units of a part: records."""

    def _template(self) -> Template:
        return one_field("text")

    def entries(self, part: Part, max_bytes: int) -> Iterator[Document | Problem]:
        try:
            for i, record in enumerate(read_records(part.path, part.start, part.stop), part.start):
                yield self._document(part, i, record, max_bytes)
        except UserError as e:
            yield Problem("unreadable", str(e))
        except OSError as e:
            yield Problem("unreadable", unreadable(part.path, e))

    def _document(self, part: Part, i: int, record: bytes, max_bytes: int) -> Document | Problem:
        template, at = self._template(), f"{part.path}: record {i}"
        try:
            features = {field: bytes_feature(record, field.replace(".", "/")) for field in template.fields}
        except (UserError, IndexError):
            return Problem("unreadable", f"{at}: expected a tf.train.Example, got other bytes; build it again")
        lacking = [field for field, raw in features.items() if raw is None]
        if lacking:
            what = f"{at}: expected bytes in feature {lacking[0]!r}, got none; build it again"
            return Problem("missing_field", what)
        if len(features) == 1 and len(template.pieces) == 1:
            raw = features[template.fields[0]] or b""
        else:
            raw = str(template.fill(features)).encode("utf-8", errors="surrogateescape")
        return Document(f"record {i}", raw) if len(raw) <= max_bytes else too_long(at, max_bytes)


@dataclass(frozen=True, kw_only=True)
class Tfds(Fielded, Records):
    """A TensorFlow dataset by name, downloaded and built if it is not there.

    split: with slicing, "train[:10%]". field, template: text features; a nested one as "answer/text". data_dir: None is
    TFDS's own, ~/tensorflow_datasets.
    """

    name: str
    split: str = "train"
    data_dir: str | None = None

    def parts(self, cache: Path) -> list[Part]:
        return record_parts(find(self.name, self.data_dir), self.split, *self._template().fields)


def find(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """A dataset by TFDS name. UserError for an unknown one or a failed download."""
    tensorflow()  # TFDS would import it louder, and beside a thread that does
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise UserError(f"Tfds({name!r}): expected a TFDS name, with data_dir={data_dir!r}; {reason}") from None
    download_and_prepare(builder)
    return builder


def download_and_prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Downloads and builds a dataset; what is there already is kept."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def record_parts(builder: tfds.core.DatasetBuilder, split: str, *fields: str) -> list[Part]:
    """The record files of a split, in stretches of about `stretch_bytes`. UserError for a split, field or format that
    is not there or not readable."""
    name = builder.info.full_name
    file_format = builder.info.file_format.value
    if file_format != "tfrecord":
        raise UserError(
            f"{name}: expected file_format tfrecord, got {file_format}; build it with file_format='tfrecord'"
        )
    texts = sorted(_text_features(builder.info.features))
    for field in fields:
        if field.replace(".", "/") not in texts:
            raise UserError(
                f"{name}: expected field to be one of its texts {texts}, got {field!r}; set Tfds(field=...)"
            )
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as e:
        raise UserError(f"{name}: expected a split of {sorted(builder.info.splits)}, got {split!r} ({e})") from None
    for i in instructions:
        if not os.path.isfile(i.filename):
            raise UserError(
                f"{i.filename}: expected it as the dataset_info.json beside it says, got nothing there; copy it again "
                f"or delete {os.path.dirname(i.filename)}, to build it anew"
            )
    parts, part_bytes = [], stretch_bytes(sum(os.path.getsize(i.filename) for i in instructions))
    for i in instructions:
        n = i.examples_in_shard if i.take == -1 else i.take
        n_bytes = os.path.getsize(i.filename) * n // max(1, i.examples_in_shard)
        step = -(-n // max(1, round(n_bytes / part_bytes)))
        for at in range(i.skip, i.skip + n, max(1, step)):
            stop = min(at + step, i.skip + n)
            parts.append(Part(str(i.filename), at, stop, n_bytes * (stop - at) // max(1, n)))
    return parts


def _text_features(features: Any, prefix: str = "") -> Iterator[str]:
    import tensorflow_datasets as tfds

    for name, feature in features.items():
        if isinstance(feature, tfds.features.Text):
            yield prefix + name
        elif isinstance(feature, tfds.features.FeaturesDict):
            yield from _text_features(feature, f"{prefix}{name}/")
