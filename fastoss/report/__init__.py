"""Run → pictures: what a run wrote into its directory, drawn. Imports no torch."""
