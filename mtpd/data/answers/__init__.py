"""Where answers to prompts come from, and the file that keeps them by what they depend on."""
