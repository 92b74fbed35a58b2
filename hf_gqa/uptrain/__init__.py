"""Floor 4: continued training that gives a converted student its quality back."""
