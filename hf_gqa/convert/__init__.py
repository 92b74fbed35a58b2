"""Floor 3: (donor, plan) -> student, tensor by tensor."""
