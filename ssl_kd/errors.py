"""The one exception a user's mistake raises."""


class UserError(Exception):
    """A mistake the user can mend: its text is one sentence that names the key, file or value and the remedy.

    Launchers print the sentence and exit with status 2; anything else that escapes is a bug and keeps its traceback.
    """
