"""A simulated BeansAI: real pictures, its own bill, and every way in which an answer can go wrong, on order.

It stands in for an upstream that knows nothing of the gateway: it reads requests and keeps its books by itself, so that
each can show where the other errs. What a prompt can order is in :mod:`.directives`.

- ``POST /v1/images/generations``, ``POST /v1/images/edits``, ``GET /v1/models`` with ``Bearer sk-beans-...``
- ``GET /simulator/bill``, ``GET /simulator/requests``, ``POST /simulator/reset``, and the pictures behind ``[[sim url]]``
"""

from proxy.simulator.bills import fingerprint
from proxy.simulator.options import SimulatorOptions
from proxy.simulator.server import Simulator, run_simulator, running_simulator

__all__ = ["Simulator", "SimulatorOptions", "fingerprint", "run_simulator", "running_simulator"]
