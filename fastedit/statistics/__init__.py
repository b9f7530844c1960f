"""Second moments of a model's keys: collect them, keep them in files, find them again."""
