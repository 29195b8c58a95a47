"""`python -m mrss_provider.cli` is `mrss`."""

from mrss_provider.cli import main

main()
