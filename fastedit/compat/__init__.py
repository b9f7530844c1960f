"""Serve other editing code with our methods: its calls, hyperparameters, requests and files."""
