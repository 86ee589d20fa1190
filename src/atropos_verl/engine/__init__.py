"""Inference: the engine protocol, the request gate, the embedded engine and the HTTP gateway environments call."""
