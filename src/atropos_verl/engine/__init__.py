"""The engine protocol, the request gate, and the embedded engine."""
