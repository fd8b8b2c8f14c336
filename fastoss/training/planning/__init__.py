"""What a run will take, before anything loads, and what this machine has."""
