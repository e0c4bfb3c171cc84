"""Training data of heads: models, prompts, responses, packed rows and the hidden-state store."""
