"""What can go wrong, by whose fault it is; each error is one sentence that says what would be right."""


class BarberError(Exception):
    """An error that the command line prints as one sentence, without a traceback."""

    exit_code = 1


class UserError(BarberError, ValueError):
    """A mistake in the configuration or the input data: what is wrong, where, and what would be right.

    `field` names the component's field at fault; the message then reads on from it ("must be ..."), so that the
    command line can put the full config key in front of it.
    """

    exit_code = 2

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(f"{field} {message}" if field else message)
        self.field = field


class NumericsError(BarberError):
    """NaN or infinite activations, losses or scores: the run stops, naming the layer and the linear."""
