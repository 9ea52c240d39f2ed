"""The one exception a user's mistake raises, and what it quotes of others."""


class UserError(Exception):
    """A mistake the user can mend: its text is one sentence that names the key, file or value and the remedy.

    Launchers print the sentence and exit with status 2; anything else that escapes is a bug and keeps its traceback.
    """


def reason(error: Exception) -> str:
    """The first line of what an error says, for a sentence of ours."""
    text = (isinstance(error, OSError) and error.strerror) or str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0]
