"""The processes of a run: what to start (``plan``), how to start and end it (``process``), and when it is up."""
