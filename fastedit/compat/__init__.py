"""Inside other editing code: its calls, its hyperparameters, its requests and its files, served by our methods."""
