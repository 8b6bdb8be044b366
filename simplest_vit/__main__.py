"""`python -m simplest_vit COMMAND`, which is `simplest-vit COMMAND` where it is not installed."""

from simplest_vit.programs import main

main()
