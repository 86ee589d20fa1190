"""Environments of other ecosystems as Atropos environments: each adapter is a file on their public API."""
