"""Provenance: ledger and attribution find the policy version that wrote each token; the throttle bounds staleness."""
