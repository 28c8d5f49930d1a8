"""Models whose feed-forward neurons are mostly idle: their files, and the engine that skips those neurons."""
