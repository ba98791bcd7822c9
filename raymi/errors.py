"""What is shown to people when something is their mistake, or the machine's, rather than raymi's."""


class UserError(Exception):
    """A mistake its maker can mend. The command line prints it without a traceback and exits with `exit_code`.

    Args:
        what: what is wrong and where (file, line, field, model).
        hint: what to do next; printed on its own line.
    """

    exit_code = 2

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}" if self.hint else self.what
