"""Beanmeter: a cost-metering reverse proxy for image generation.

The rooms, from the ground up. A file imports only from floors below its own.

- floor 0: ``money``, ``periods``, ``tokens``, ``errors``, ``headers``, ``skim``, ``images`` -- pure, know nothing of each other
- floor 1: ``prices``, ``forms``, ``whole``, ``door``, ``inputs`` -- pure: what an image costs, how a form is read, how small
  JSON is read at once, who may see the books, how queries and documents are read
- floor 2: ``orders``, ``taps/`` -- pure: what a request asks for, and what an answer brought
- floor 3: ``outcomes``, ``settings``, ``spool``, ``transport`` -- what an end means for the money, what the operator decides,
  bodies on disk, HTTP to one upstream
- floor 4: ``ledger/``, ``upstream``, ``logs``, ``signals``, ``simulator/`` -- the database, the way to BeansAI, what the
  operating system tells, a BeansAI to try against
- floor 5: ``metrics``, ``tracing/``, ``keyring``, ``refusals``, ``usage`` -- what is counted, what is told of an exchange to
  others, who is calling, what a caller reads when the ledger says no, what tools read of prices and sums
- floor 6: ``exchange``, ``admin/``, ``pages/`` -- one exchange's life, from the hold to the books; what the operator sees and
  changes; what people look at
- floor 7: ``gateway``, ``endpoints`` -- from a client's request to an exchange, and what is asked with GET
- floor 8: ``server``, ``supervisor`` -- the HTTP edge, and several processes behind one
- floor 9: ``app`` -- wiring
- floor 10: ``demo``, ``worker`` -- everything together, with sample teams; one process of several
- floor 11: ``cli/`` -- the commands
"""

__version__ = "0.1.0"
