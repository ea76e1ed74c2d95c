"""The bundled model: its scenes, its training script, its weights and its card."""
