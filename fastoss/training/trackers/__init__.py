"""metrics.jsonl → the trackers that a recipe names."""
