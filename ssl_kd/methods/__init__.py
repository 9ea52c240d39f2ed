"""One paper, one file. A method is a frozen dataclass: its fields are its hyper-parameters, and three pure functions.

To add one: write its file, add a line to METHODS, write a config. The parametrised tests pick it up.
"""

from ssl_kd.methods.bingo import BINGO
from ssl_kd.methods.compress import CompRess
from ssl_kd.methods.disco import DisCo
from ssl_kd.methods.moco import MoCo
from ssl_kd.methods.mokd import MOKD
from ssl_kd.methods.protocol import Aux, Context, Method, View
from ssl_kd.methods.rekd import ReKD
from ssl_kd.methods.ressl import ReSSL
from ssl_kd.methods.seed import SEED
from ssl_kd.methods.simreg import SimReg

METHODS: dict[str, type] = {
    "bingo": BINGO,
    "compress": CompRess,
    "disco": DisCo,
    "moco_v2": MoCo,
    "mokd": MOKD,
    "rekd": ReKD,
    "ressl": ReSSL,
    "seed": SEED,
    "simreg": SimReg,
}

__all__ = ["METHODS", "Aux", "Context", "Method", "View"]
