"""What a user can get wrong."""


class ReportError(Exception):
    """A mistake of the user, in one sentence."""
