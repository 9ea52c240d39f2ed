"""Weights of others, as teachers and as a student's start: what is known, what a file holds, conversion, a check.

python launch/teacher.py list
python launch/teacher.py inspect SOURCE [--model=NAME]
python launch/teacher.py convert SOURCE OUT.safetensors [--model=NAME] [--licence=TEXT]
python launch/teacher.py verify FILE

SOURCE is file:PATH or hf:OWNER/REPOSITORY/FILE, with #KEY behind it to choose one of several state dicts; a run of
one's own needs no conversion: teacher.source=workdir:PATH.
"""

from collections.abc import Callable

from absl import flags

from ssl_kd import command
from ssl_kd.errors import UserError
from ssl_kd.weights import commands

MODEL = flags.DEFINE_string("model", "", "Key of MODELS, where the weights fit several.")
LICENCE = flags.DEFINE_string("licence", "", "Terms of the weights, as 'Apache-2.0'; recorded in the converted file.")

VERBS: dict[str, tuple[int, Callable[..., None]]] = {
    "list": (0, commands.show_models),
    "inspect": (1, lambda source: commands.inspect(source, MODEL.value)),
    "convert": (2, lambda source, out: commands.convert(source, out, MODEL.value, LICENCE.value)),
    "verify": (1, commands.verify),
}


def main(words: list[str]) -> None:
    verb, *arguments = words or [""]
    if verb not in VERBS or len(arguments) != VERBS[verb][0]:
        raise UserError("say `list`, `inspect SOURCE`, `convert SOURCE OUT.safetensors` or `verify FILE`.")
    VERBS[verb][1](*arguments)


if __name__ == "__main__":
    command.run(main, words=True)
