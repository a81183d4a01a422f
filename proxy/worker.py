"""One worker process of several: serves on a socket that it was handed, by the terms that its supervisor sends, until the
line to the supervisor ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from pathlib import Path

import uvloop

from proxy import logs
from proxy.app import Application, serving, spare_collector
from proxy.metrics import share
from proxy.signals import Signals
from proxy.supervisor import SERVING, receive


async def work(listener: socket.socket, line: socket.socket) -> None:
    """Serve until the line ends or SIGTERM comes, and finish what is open. SIGTERM after that breaks it off."""
    orders, answers = await asyncio.open_connection(sock=line)
    terms = await receive(orders)
    if terms is None:
        return
    signals = Signals()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signals.told_to_end)
    application = Application(*terms)

    async def obey() -> None:
        try:
            while (renewed := await receive(orders)) is not None:
                application.adopt(renewed)
        finally:
            signals.end.set()

    async with serving(application, listener, signals.end_now):
        spare_collector()
        answers.write(SERVING)
        obeying = asyncio.create_task(obey())
        await signals.end.wait()
        obeying.cancel()
    answers.close()


def main() -> None:
    """Arguments: the worker's number, the descriptors of socket and line, the directory of metrics."""
    number, listener, line, metrics = sys.argv[1:]
    # A terminal sends these to all its processes; what becomes of them is the supervisor's to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logs.configure(sys.stderr)
    share(Path(metrics), int(number))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work(socket.socket(fileno=int(listener)), socket.socket(fileno=int(line))))


if __name__ == "__main__":
    main()
