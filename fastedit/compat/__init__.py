"""Other people's editing code and formats: their calls, hyperparameters, requests and files, served by our methods."""
