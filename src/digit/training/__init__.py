"""Training: one resumable loop and what it stands on. A leaf: it gets a model, batches and a loss."""
