"""Hand-written helpers shared by the tests (``from support.tiny_model import build_tiny_model``)."""
