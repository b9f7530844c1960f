"""Other people's formats and calls."""
