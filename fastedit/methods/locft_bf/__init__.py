"""LocFT-BF: localized fine-tuning, breadth-first (arXiv 2509.22072)."""
