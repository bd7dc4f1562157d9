"""`python -m moesteer`."""

from moesteer.cli import main

main()
