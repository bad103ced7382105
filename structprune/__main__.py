"""`python -m structprune`."""

from structprune.cli import main

main()
