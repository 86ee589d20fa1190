"""The trajectory API: a drop-in replacement for atroposlib's that loses nothing, never stalls, and is fast.

``TrajectoryServer`` runs it in a thread, ``serve`` until a signal, ``create_app`` makes the ASGI application.
"""

from atropos_verl.server.app import TrajectoryApi, create_app
from atropos_verl.server.serving import TrajectoryServer, serve
from atropos_verl.server.settings import ServerSettings

__all__ = ["ServerSettings", "TrajectoryApi", "TrajectoryServer", "create_app", "serve"]
