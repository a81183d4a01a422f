"""Beanmeter: a cost-metering reverse proxy for image generation.

The rooms, from the ground up (a file imports only from floors below its own):

- floor 0: ``money``, ``periods``, ``errors``, ``skim``, ``tokens`` -- pure, know nothing of HTTP or SQL
- floor 1: ``prices``, ``orders``, ``forms``, ``images``, ``taps``, ``headers``, ``settings`` -- pure
- floor 2: ``ledger/``, ``spool``, ``upstream``, ``metrics``, ``logs`` -- files, sockets, the database
- floor 3: ``gateway`` -- one exchange's life
- floor 4: ``app``, ``server``, ``simulator``, ``demo``, ``cli/`` -- wiring and commands
"""

__version__ = "0.1.0"
