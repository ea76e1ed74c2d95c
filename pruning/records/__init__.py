"""What was measured: the record as JSON, the images on disk, and the figures and texts made from both. No torch."""
