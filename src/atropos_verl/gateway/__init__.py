"""The HTTP surface that Atropos environments call: OpenAI's API and the native dialects of vLLM, SGLang and trl.

``create_app(engine, tokenizer, model_name=...)`` builds the ASGI application, ``GatewayServer(app)`` serves it from a
thread of this process.
"""

from atropos_verl.gateway.app import create_app
from atropos_verl.gateway.server import GatewayServer
from atropos_verl.gateway.service import Gate

__all__ = ["Gate", "GatewayServer", "create_app"]
