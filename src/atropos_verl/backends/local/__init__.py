"""The local backend: verl's engine in this process (or under torchrun), no Ray, and the embedded inference engine."""
