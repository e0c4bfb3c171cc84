"""Commands from beginning to end: the steps of a run, its directory, and finished runs opened again."""
