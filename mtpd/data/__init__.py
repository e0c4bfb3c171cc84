"""What heads are trained on: models, prompts, responses, packed rows and the hidden-state store."""
