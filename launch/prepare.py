"""Packs a set of images once, reduced, into shards that training reads by data.source=arrayrecord:OUT.

python launch/prepare.py SOURCE OUT [--splits=train,test] [--short=256] [--format=jpeg] [--quality=90] …
python launch/prepare.py --verify OUT

SOURCE is a data.source of any kind (folder:PATH, hf:PATH, tar:PATTERN, tfds:NAME). The same command goes on where it
was stopped. Rows keep their order and numbers, so that labels and subsets stay; but images that cannot be read are left
out (and named in OUT/bad.txt), and the rows after them move up.
"""

from pathlib import Path

from absl import flags

from ssl_kd import command
from ssl_kd.data.prepare import Packing, pack_set, verify
from ssl_kd.errors import UserError

SPLITS = flags.DEFINE_list("splits", ["train", "test"], "Splits to pack, or parts of them, as train[:10%].")
SHORT = flags.DEFINE_integer("short", 256, "Pixels that shorter sides are reduced to.", lower_bound=1)
FORMAT = flags.DEFINE_enum(
    "format", "jpeg", ["jpeg", "raw"], "Stored as JPEG, or as exact pixels, many times as large."
)
QUALITY = flags.DEFINE_integer("quality", Packing.quality, "Of the JPEGs.", lower_bound=1, upper_bound=100)
SHARD_MIB = flags.DEFINE_integer("shard_mib", 256, "About the size of a shard.", lower_bound=1)
WORKERS = flags.DEFINE_integer("workers", 0, "Threads; 0 = one per core.", lower_bound=0)
MAX_BAD = flags.DEFINE_float(
    "max_bad", 0.01, "Share of unreadable images, 10 or more, at which to stop.", lower_bound=0.0, upper_bound=1.0
)
VERIFY = flags.DEFINE_bool("verify", False, "Compare the shards of OUT with their checksums.")


def main(words: list[str]) -> None:
    if len(words) != (1 if VERIFY.value else 2):
        raise UserError("say `SOURCE OUT`, as `folder:/photos packed`, or `--verify OUT`.")
    out = Path(words[-1])
    if VERIFY.value:
        return verify(out)
    packing = Packing(words[0], SPLITS.value, SHORT.value, FORMAT.value, QUALITY.value, SHARD_MIB.value)
    pack_set(packing, out, workers=WORKERS.value, max_bad=MAX_BAD.value)


if __name__ == "__main__":
    command.run(main, words=True)
