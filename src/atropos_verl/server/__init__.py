"""The trajectory API: a drop-in replacement for atroposlib's that loses nothing, never stalls, and is fast."""
