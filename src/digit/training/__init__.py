"""Training: one resumable loop, and one file per objective. It imports models and runtime only."""
