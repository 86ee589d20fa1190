"""The two backends: verl in this process (local), and verl's V1 trainer on Ray (ray)."""
