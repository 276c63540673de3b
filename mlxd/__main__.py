"""`python -m mlxd`."""

from mlxd.cli import main

main()
