"""`python -m raymi` is `raymi`."""

from raymi.cli.main import main

main()
