"""The embedded engine in a process of its own: ``engine`` is the trainer's side, ``child`` the other.

::

    trainer's process                                    engine's process
    gateway ─▶ ProcessEngine ──── socket: messages ────▶ reader ─▶ SharedEngine (thread, slots, model)
       gate ─▶   hold / go   ◀─── one frame per step ───             │
    trainer ─▶ WeightStore ═══ two buffers in shared memory ═══ parameters are views of one of them

Nothing is imported here, so that the child is up before torch is.
"""
