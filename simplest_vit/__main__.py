"""`python -m simplest_vit`: the command line if `simplest-vit` is not installed."""

from simplest_vit.commands import main

main()
