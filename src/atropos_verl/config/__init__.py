"""Settings of a run: schema, composition, checks."""
