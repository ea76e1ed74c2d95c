"""The bundled models and metric networks: the scenes, the training script, the weights and the model cards."""
