"""Locate-then-edit: ROME, MEMIT, EMMET and AlphaEdit as one objective × one distribution (arXiv 2403.14236)."""
