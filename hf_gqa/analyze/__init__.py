"""Floor 5: which layers can share: how alike their attention is, what borrowing costs, and the sharing that costs least."""
