"""`python -m barber` is the command `barber`."""

from barber.cli import main

main()
