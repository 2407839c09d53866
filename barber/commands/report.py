"""barber report FOLDER... [--out DIR]: tables, pictures and a page of the runs below folders."""

from barber.report.__main__ import main as report


def main(arguments: list[str]) -> int:
    """Write them, and print the table."""
    return report(arguments)
