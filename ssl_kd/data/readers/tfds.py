"""TensorFlow Datasets, read without TensorFlow."""

import functools
from typing import Any

import numpy as np

from ssl_kd.errors import UserError, reason


class TfdsReader:
    """A split of a TFDS set prepared as array_record, read without TensorFlow; the directory is TFDS_DATA_DIR's."""

    def __init__(self, name: str, split: str) -> None:
        spec = f"data source 'tfds:{name}'"
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            remedy = "pip install tensorflow-datasets array_record importlib_resources"
            raise UserError(f"{spec} cannot be read ({reason(error)}); run: {remedy}") from error
        try:
            builder = tfds.builder(name, file_format="array_record")
        except (ValueError, AttributeError, LookupError, OSError) as error:
            raise UserError(f"{spec} cannot be opened ({reason(error)}); check its name") from error
        if not builder.info.splits:
            prepare = f"tfds.builder('{name}', file_format='array_record').download_and_prepare()"
            raise UserError(
                f"{spec} is not prepared in {builder.data_dir}; where tensorflow is installed, run: "
                f'python -c "import tensorflow_datasets as tfds; {prepare}"'
            )
        if split not in builder.info.splits:
            raise UserError(f"{spec} has no split {split!r}; it has {', '.join(builder.info.splits)}")
        features = builder.info.features
        images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
        labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
        if not images:
            raise UserError(f"{spec} has no image feature (it has {', '.join(features)}); choose an image set")
        self.name, self.split, self.image = name, split, images[0]
        self.label = labels[0] if labels else None
        self.num_classes = features[self.label].num_classes if self.label else None
        self.class_names = tuple(features[self.label].names) if self.label else None
        self.rows = builder.as_data_source(split, decoders={self.image: tfds.decode.SkipDecoding()})
        self._example = functools.lru_cache(maxsize=64)(self._read)  # its image and its label are asked for in turn

    def __reduce__(self) -> tuple:
        return TfdsReader, (self.name, self.split)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> bytes:
        return self._example(row)[self.image]

    def labels(self) -> np.ndarray:
        return np.array([self.label_of(row) for row in range(len(self))], np.int32)

    def label_of(self, row: int) -> int:
        return int(self._example(row)[self.label]) if self.label else -1

    def _read(self, row: int) -> dict[str, Any]:
        try:
            return self.rows[row]
        except (OSError, RuntimeError, ValueError) as error:  # array_record's and protobuf's, of a damaged shard
            raise UserError(f"{self.where(row)} cannot be read ({reason(error)}); prepare the set again") from error

    def where(self, row: int) -> str:
        return f"row {row} of tfds:{self.name} {self.split}"
