"""Which policy version wrote which token: ledger, attribution, throttle."""
