"""Losses as pure tensor functions. Imports torch; nothing here knows verl, a trainer or a process group."""
