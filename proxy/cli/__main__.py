"""``python -m proxy.cli``: the same as ``beanmeter``."""

from proxy.cli import main

main()
