"""Second moments of a model's keys: collected, kept in files, found again."""
