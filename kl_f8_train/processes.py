"""The helper processes of this one, and their end."""

import multiprocessing
import signal
import threading


def end_children() -> None:
    """Kills and reaps the daemonic children that are left; loaders are deaf to SIGTERM.

    torch watches its loaders by SIGCHLD and would raise an error for each of them.
    """
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if not children:
        return
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    for child in children:
        child.kill()
    for child in children:
        child.join()
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
