"""Agents that exist already: a client of the gateway's sessions, and the runner that makes them environments."""
