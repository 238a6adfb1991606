"""`python -m fusionroute`."""

from fusionroute.cli import main

main()
