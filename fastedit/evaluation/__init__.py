"""Measuring models and edits."""
