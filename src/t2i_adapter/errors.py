"""The one exception for what a person can mend."""


class UserError(Exception):
    """Something the person who ran the command can mend: it becomes one clear line and exit code 2.

    The message says what was got, what is allowed, and what to do, naming the file, row, flag or column.
    A mistake of ours is an `assert` or any other exception, and keeps its traceback.
    """
