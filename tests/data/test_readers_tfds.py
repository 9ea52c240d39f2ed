"""A prepared TFDS set, read without TensorFlow."""

import gc
import io
import pickle
import sys

import numpy as np
import pytest
from pictures import encode, noise

from ssl_kd.data.decode import decode
from ssl_kd.data.readers import open_reader
from ssl_kd.errors import UserError


def test_a_prepared_set_is_read_without_tensorflow(tmp_path, monkeypatch):
    # While TFDS imports itself lazily nothing else may import: finalise what grain's workers left behind before.
    gc.collect()
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    images = noise(5, 6, 8)

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
            label = tfds.features.ClassLabel(num_classes=3)
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, image in enumerate(images):  # an open file is stored as it is; an array would need TensorFlow
                yield i, {"image": io.BytesIO(encode(image)), "label": i % 3}

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    reader = pickle.loads(pickle.dumps(open_reader("tfds:tiny", "train")))
    got = [decode(reader.read(row), str) for row in range(len(reader))]
    assert reader.num_classes == 3 and reader.class_names == ("0", "1", "2") and reader.labels().dtype == np.int32
    order = [next(i for i, image in enumerate(images) if (image == g).all()) for g in got]  # TFDS shuffles by key
    assert sorted(order) == list(range(5))
    np.testing.assert_array_equal(reader.labels(), np.array(order) % 3)
    assert [reader.label_of(row) for row in range(5)] == reader.labels().tolist()
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        open_reader("tfds:tiny", "test")
    with pytest.raises(UserError, match=r"'tfds:cifar10' is not prepared in .*download_and_prepare\(\)"):
        open_reader("tfds:cifar10", "train")
    assert "tensorflow" not in sys.modules

    class Damaged:
        asked = 0

        def __getitem__(self, row):
            self.asked += 1
            if row == 3:
                raise RuntimeError("Crc32 mismatch")
            return rows[row]

    reader = open_reader("tfds:tiny", "train")
    rows, reader.rows = reader.rows, Damaged()
    assert reader.read(2) and reader.label_of(2) == order[2] % 3 and reader.rows.asked == 1
    for read in (reader.read, reader.label_of):
        with pytest.raises(UserError, match=r"row 3 of tfds:tiny train cannot be read \(Crc32 mismatch\); prepare"):
            read(3)


def test_unknown_or_not_installed(monkeypatch):
    with pytest.raises(UserError, match="'tfds:nonesuch' cannot be opened"):
        open_reader("tfds:nonesuch", "train")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="run: pip install tensorflow-datasets"):
        open_reader("tfds:cifar10", "train")
