"""Text to train and to evaluate on, read by the datasets library."""
